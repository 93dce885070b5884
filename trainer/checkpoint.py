"""Checkpoints: the trainer's state for a resumed run, and for some a Hugging Face folder that any engine loads.

A checkpoint is a folder ``step-000050``, created atomically: it is written under a temporary name, synced and renamed.
A folder left incomplete by a kill keeps the temporary name, is never read, and is removed by the next save.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import ArtifactMismatch, BadInput, RunFailed
from ..manifests.files import bounded_json
from ..manifests.files.storage import remove, sync
from .distributed import ALONE, Distributed
from .policy.state import FOLDER as STATE_FOLDER
from .policy.state import save_state, sort_headers

FACTS = "trainer.json"
OLDER_STATE = "trainer.pt"  # the optimizer's state in older checkpoints, all of which are Hugging Face folders
PARTIAL = ".partial"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Facts:
    """Metadata of a checkpoint: steps done, the run's fingerprint, ``figures`` for later steps and `capipe eval`."""

    step: int
    fingerprint: str
    figures: dict[str, Any]

    def __post_init__(self) -> None:
        """Validate values read from a file. Raises TypeError for other types than we write."""
        if not (isinstance(self.step, int) and isinstance(self.fingerprint, str) and isinstance(self.figures, dict)):
            raise TypeError("step, fingerprint or figures are of another kind")
        alarms, reader = self.figures.get("alarms", {}), self.figures.get("reader")
        if not (isinstance(alarms, dict) and all(isinstance(count, int) for count in alarms.values())):
            raise TypeError("alarms are no counts")
        match reader:
            case None | {"name": str(), "digest": str() | None} if len(reader or ()) in (0, 2):
                return
        raise TypeError("reader is no name with a digest")


class CheckpointWriter:
    """Writes a run's checkpoints ``run/step-…`` and keeps the newest ``keep``; the state is written in the background.

    A checkpoint counts once all of it is on disk and its folder has its name; until then the one before does.
    """

    def __init__(self, run: Path, distributed: Distributed = ALONE, keep: int = 3) -> None:
        self.run, self.keep = run, keep
        self._distributed = distributed
        self._state: Future[Any] | None = None
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def save(
        self,
        facts: Facts,
        state: Mapping[str, Tensor],
        write_model: Callable[[Path], None] | None,
        best: int | None = None,
        then: Callable[[], None] | None = None,
    ) -> Path:
        """Copy ``state`` and begin to write it; returns the folder's name to be. :meth:`finish` waits for it.

        ``write_model``: writes files for other programs into the checkpoint, before this returns. ``best``: step of a
        checkpoint to keep besides the newest. ``then``: called in the first process once the checkpoint counts.

        A collective call for all processes if weights are sharded, else of use in the first alone. Raises as
        :meth:`finish`, of the checkpoint before.
        """
        self.finish()
        first, final = self._distributed.first, folder_of(self.run, facts.step)
        partial = final.with_name(final.name + PARTIAL)
        if first:
            self.run.mkdir(parents=True, exist_ok=True)
            for unfinished in self.run.glob(f"step-*{PARTIAL}"):
                remove(unfinished)
            partial.mkdir()
        if self._distributed.sharded:
            self._distributed.wait()  # the folder is there, and what a kill left in it is not
        elif not first:
            return final
        if first and write_model is not None:
            write_model(partial)
        self._state = save_state(partial / STATE_FOLDER, state, self._distributed)
        if first:
            arguments = (partial, final, facts, best, then)
            self._thread = threading.Thread(target=self._complete, args=arguments, name="checkpoint")
            self._thread.start()
        return final

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises RunFailed if it could not be."""
        thread, state, self._thread, self._state = self._thread, self._state, None, None
        if thread is not None:
            thread.join()
        elif state is not None:
            self._failed = state.exception()
        failed, self._failed = self._failed, None
        if failed is not None:
            raise RunFailed(f"{self.run}: a checkpoint could not be written ({_reason(failed)})") from failed

    def _complete(
        self, partial: Path, final: Path, facts: Facts, best: int | None, then: Callable[[], None] | None
    ) -> None:
        assert self._state is not None
        try:
            self._state.result()  # in the first process: those of all processes are on disk
            sort_headers(partial / STATE_FOLDER)
            (partial / FACTS).write_text(json.dumps(asdict(facts), sort_keys=True))
            for file in partial.rglob("*"):
                sync(file)
            sync(partial)
            if final.exists():  # written before, without what is in it now
                remove(final)
            partial.rename(final)
            sync(self.run)
            if then is not None:
                then()
            for old in checkpoints(self.run)[: -self.keep]:
                if best is None or old != folder_of(self.run, best):
                    remove(old)
        except BaseException as error:  # of a thread: raised by finish()
            self._failed = error


def save(
    run: Path, facts: Facts, write_model: Callable[[Path], None] | None, state: Mapping[str, Tensor], keep: int = 3
) -> Path:
    """Write a checkpoint as :class:`CheckpointWriter`, to its end."""
    writer = CheckpointWriter(run, keep=keep)
    made = writer.save(facts, state, write_model)
    writer.finish()
    return made


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]


def folder_of(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


def is_model_folder(checkpoint: Path) -> bool:
    """Whether a checkpoint is a Hugging Face folder, which any engine loads."""
    return (checkpoint / "config.json").is_file()


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [path for path in run.glob("step-*") if _NAME.fullmatch(path.name) and (path / FACTS).is_file()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest(run: Path, fingerprint: str) -> tuple[Path, Facts] | None:
    """Checkpoint to resume from. Raises ArtifactMismatch if it is from another recipe or other questions."""
    folders = checkpoints(run)
    if not folders:
        return None
    facts = read_facts(folders[-1])
    if facts.fingerprint != fingerprint:
        raise ArtifactMismatch(
            f"{folders[-1]}: made by another recipe, model or question set; use another --out, or --fresh to start over"
        )
    return folders[-1], facts


def read_facts(checkpoint: Path) -> Facts:
    """Read a checkpoint's metadata. Raises BadInput if the file is invalid."""
    try:
        return Facts(**bounded_json.load(checkpoint / FACTS))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(
            f"{checkpoint / FACTS}: cannot be read ({error}); remove the folder to go on from the one before"
        ) from None


def older_optimizer_state(checkpoint: Path) -> dict[str, Any]:
    """Optimizer state of an older checkpoint (loaded as plain tensors; no code in it is executed)."""
    state: dict[str, Any] = torch.load(checkpoint / OLDER_STATE, weights_only=True, map_location="cpu")
    return dict(state["optimizer"])
