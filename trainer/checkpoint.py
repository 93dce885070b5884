"""Checkpoints: a Hugging Face folder that any engine loads, plus the trainer's state for a resumed run.

A checkpoint is a folder ``step-000050``, created atomically: it is written under a temporary name, synced and renamed.
A folder left incomplete by a kill keeps the temporary name, is never read, and is removed by the next save.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactMismatch, BadInput
from ..manifests.files import bounded_json
from ..manifests.files.storage import remove, sync

STATE, FACTS = "trainer.pt", "trainer.json"
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


def save(
    run: Path,
    facts: Facts,
    write_model: Callable[[Path], None],
    optimizer: Mapping[str, Any],
    keep: int = 3,
    best: int | None = None,
) -> Path:
    """Write ``run/step-…``. ``write_model``: writes the model's files into a folder; ``optimizer``: its state.

    Keeps the newest ``keep`` checkpoints, and that of step ``best``.
    """
    run.mkdir(parents=True, exist_ok=True)
    for unfinished in run.glob(f"step-*{PARTIAL}"):
        remove(unfinished)
    final = folder_of(run, facts.step)
    partial = final.with_name(final.name + PARTIAL)
    write_model(partial)
    torch.save({"optimizer": canonical(optimizer)}, partial / STATE)
    (partial / FACTS).write_text(
        json.dumps({"step": facts.step, "fingerprint": facts.fingerprint, "figures": facts.figures}, sort_keys=True)
    )
    for file in partial.rglob("*"):
        if file.is_file():
            sync(file)
    if final.exists():  # left by a run that was killed just after the rename
        remove(final)
    partial.rename(final)
    sync(run)
    for old in checkpoints(run)[:-keep]:
        if best is None or old != folder_of(run, best):
            remove(old)
    return final


def canonical(value: Any) -> Any:
    """Normalise a state so that equal states serialise to equal bytes.

    Needed for resumed runs: betas are a tuple at first and a list once restored, and pickle distinguishes a repeated
    string object from an equal one.
    """
    if isinstance(value, Mapping):
        return {canonical(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return sys.intern(value) if isinstance(value, str) else value


def folder_of(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


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


def optimizer_state(checkpoint: Path) -> dict[str, Any]:
    """Optimizer state of a checkpoint (loaded as plain tensors; no code in it is executed)."""
    state: dict[str, Any] = torch.load(checkpoint / STATE, weights_only=True, map_location="cpu")
    return dict(state["optimizer"])
