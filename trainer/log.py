"""What a run writes down: figures per step, captions with their rewards; TensorBoard, and Weights & Biases if asked.

How long a step took is in a file of its own, ``times.jsonl``: two runs alike write the same bytes into the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BadInput
from ..manifests.files import bounded_json
from ..manifests.files.storage import open_own, write_new

if TYPE_CHECKING:  # who reads logs needs no torch
    from .policy.batch import Group

STEPS, CAPTIONS, TIMES = "steps.jsonl", "captions.jsonl", "times.jsonl"
SECONDS = "seconds/"  # how figures that are times are called


class Sink(Protocol):
    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars by step. Raises BadInput where tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BadInput(f"tensorboard does not import ({error}); pip install tensorboard") from None

        self._writer: Any = SummaryWriter(str(folder))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Figures by step to a project of Weights & Biases, or with WANDB_MODE=offline to ``folder`` alone.

    Raises BadInput where wandb is not installed, or nobody is logged in.
    """

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise BadInput(
                f"wandb: the package does not import ({error}); pip install 'capipe[log]', or leave `wandb` out"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(project=project, name=name, dir=str(folder), config=dict(config))
        except wandb.Error as error:
            told = " ".join(str(error).split())
            raise BadInput(f"wandb: {told}; to log without a server set WANDB_MODE=offline") from None
        # Not wandb's own count of steps, which only grows: validation before the first step has -1.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        self._run.finish()


class RunLog:
    """JSON lines in ``folder``. A resumed run cuts off what was logged after the step it goes on from.

    Of several processes each writes down its own captions, and the first one the figures.
    """

    def __init__(self, folder: Path, start: int, sinks: Sequence[Sink] = (), rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._first = rank == 0
        captions = CAPTIONS if self._first else f"captions-{rank}.jsonl"
        self._files = {STEPS: folder / STEPS, TIMES: folder / TIMES, CAPTIONS: folder / captions}
        for file in self._files.values() if self._first else [folder / captions]:
            _cut(file, start)
        self._sinks = sinks

    def step(self, step: int, figures: Mapping[str, float | int | str | None]) -> None:
        """The figures of a step, by name; numbers go to the sinks, too. They are all processes', so one writes them."""
        if not self._first:
            return
        taken = {name: value for name, value in figures.items() if name.startswith(SECONDS)}
        if taken:
            self._append(TIMES, [{"step": step, **taken}])
        self._append(STEPS, [{"step": step, **{k: v for k, v in figures.items() if k not in taken}}])
        numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        for sink in self._sinks:
            sink.write(step, numbers)

    def captions(self, step: int, groups: Sequence[Group]) -> None:
        """Every caption of a step with what it earned and why."""
        self._append(CAPTIONS, [entry for group in groups for entry in _entries(step, group)])

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def _append(self, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        handle = open_own(self._files[name], os.O_WRONLY | os.O_APPEND)
        with os.fdopen(handle, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _entries(step: int, group: Group) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "uid": group.uid,
            "key": group.key,
            "caption": caption.text,
            "tokens": caption.n_tokens,
            "finish_reason": caption.finish_reason,
            "score": reward.score,
            "components": reward.components,
            "details": reward.details,
            "advantage": advantage,
        }
        for caption, reward, advantage in zip(group.completions, group.rewards, group.advantages.tolist(), strict=True)
    ]


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The figures of all steps so far; a line that a kill left unfinished is not among them."""
    return _read(folder / STEPS)


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        entries = [bounded_json.parse(line) for line in file.read_bytes().split(b"\n")[:-1]]
        if not all(isinstance(entry, dict) and isinstance(entry.get("step"), int) for entry in entries):
            raise ValueError("an entry without its step")
    except ValueError as error:
        raise BadInput(f"{file}: no log of a run ({error}); restore it, or use --fresh to start over") from None
    return entries


def _cut(file: Path, start: int) -> None:
    """Keep the entries of steps before ``start``."""
    if file.exists():
        kept = [entry for entry in _read(file) if entry["step"] < start]
        write_new(file, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept).encode())
