"""Log of a run: metrics per step, captions with their rewards; TensorBoard; optionally Weights & Biases.

Timings go to a separate file, ``times.jsonl``, so that two identical runs write identical bytes to the other files.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BadInput
from ..manifests.files import bounded_json
from ..manifests.files.storage import open_own, write_new

if TYPE_CHECKING:  # reading logs must not import torch
    from .policy.batch import Group

STEPS, CAPTIONS, TIMES = "steps.jsonl", "captions.jsonl", "times.jsonl"
BEST = "best.json"  # names the best checkpoint by validation
VALIDATION, ACCURACY = "validation/", "accuracy"  # prefix of validation metrics; the one that checkpoints compete in
BEFORE = -1  # step of a validation before the first
SECONDS = "seconds/"  # prefix of the names of times


class Sink(Protocol):
    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars by step. Raises BadInput if tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BadInput(f"tensorboard does not import ({error}); pip install tensorboard") from None

        self._writer: Any = SummaryWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Metrics by step to a Weights & Biases project; with WANDB_MODE=offline to ``folder`` only.

    Raises BadInput if wandb is not installed or not logged in.
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
            reason = " ".join(str(error).split())
            raise BadInput(f"wandb: {reason}; to log without a server set WANDB_MODE=offline") from None
        # Not wandb's own step counter, which only grows: validation before the first step is step -1.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class Clock:
    """Seconds by phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            key = f"{SECONDS}{name}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started

    def total(self) -> float:
        return sum(self.seconds.values())


def progress_line(step: int, steps: int, metrics: Mapping[str, Any], clock: Clock) -> str:
    """One line about a step, for the terminal."""
    skipped = f" skipped: {metrics['skipped']}" if metrics["skipped"] else ""
    shared = f"norm {metrics['norm']:.2f}"
    shared += f" entropy {metrics['entropy']:.2f}" if metrics["entropy"] is not None else ""
    shared += f" kl {metrics['kl']:.3g}" if metrics["kl"] is not None else ""  # nats a token, k3
    shared += f" mismatch {metrics['mismatch']:.1g}" if metrics["mismatch"] is not None else ""
    tokens = f"tokens {metrics['tokens_per_caption']:.0f}"
    if metrics["captions"] and metrics["reward"] is None and not metrics["unscored_share"]:  # nothing is ever scored
        return f"step {step}/{steps} loss {metrics['loss']:.3f} {tokens} {shared} {clock.total():.1f} s{skipped}"
    reward = "none" if metrics["reward"] is None else f"{metrics['reward']:.3f}"
    refilled = f" refilled {metrics['refilled']}" if "refilled" in metrics else ""
    return (
        f"step {step}/{steps} reward {reward} {tokens} {shared} tied {metrics['tied']}/{metrics['groups']}{refilled} "
        f"{clock.total():.1f} s{skipped}"
    )


class RunLog:
    """JSON lines in ``folder``, truncated to the step that a run resumes from; empty where a run starts.

    Every process logs its own captions; only the first logs metrics.
    """

    def __init__(self, folder: Path, start: int, sinks: Sequence[Sink] = (), rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._first = rank == 0
        captions = CAPTIONS if self._first else f"captions-{rank}.jsonl"
        self._files = {STEPS: folder / STEPS, TIMES: folder / TIMES, CAPTIONS: folder / captions}
        for file in self._files.values() if self._first else [folder / captions]:
            _cut(file, start or BEFORE)
        self._sinks = sinks

    def step(self, step: int, metrics: Mapping[str, float | int | str | None]) -> None:
        """Log a step's metrics over all processes; numbers go to the sinks, too."""
        if not self._first:
            return
        times = {name: value for name, value in metrics.items() if name.startswith(SECONDS)}
        if times:
            self._append(TIMES, [{"step": step, **times}])
        self._append(STEPS, [{"step": step, **{k: v for k, v in metrics.items() if k not in times}}])
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for sink in self._sinks:
            sink.write(step, numbers)

    def captions(self, step: int, groups: Sequence[Group], replaced: Sequence[Group] = ()) -> None:
        """Log every caption of a step with its rewards and their details; last those of ``replaced`` groups."""
        entries = [entry for group in groups for entry in _entries(step, group)]
        entries += [{**entry, "replaced": True} for group in replaced for entry in _entries(step, group)]
        self._append(CAPTIONS, entries)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def _append(self, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        handle = open_own(self._files[name], os.O_WRONLY | os.O_APPEND)
        with os.fdopen(handle, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _entries(step: int, group: Group) -> list[dict[str, Any]]:
    advantages = group.advantages.tolist() or [0.0] * len(group.completions)  # none were assigned to a replaced group
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
        for caption, reward, advantage in zip(group.completions, group.rewards, advantages, strict=True)
    ]


@dataclass(frozen=True)
class Best:
    """The best validated checkpoint: after ``step`` steps, ``metric`` of validation was ``value``."""

    step: int
    value: float
    metric: str = ACCURACY

    def __post_init__(self) -> None:
        """Validate values read from a file. Raises TypeError for other types than we write."""
        if not (isinstance(self.step, int) and isinstance(self.value, int | float) and isinstance(self.metric, str)):
            raise TypeError("step, value or metric are of another kind")

    def line(self) -> str:
        return f"step-{self.step:06d} (validation {self.metric} {self.value:.3f})"


def best_validated(entries: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> Best | None:
    """The best of the checkpoints after ``steps`` by a run's log, the first of equals; None if none was validated."""
    name = VALIDATION + ACCURACY
    values = {entry["step"] + 1: entry[name] for entry in entries if name in entry}
    known = [Best(step, float(value)) for step in steps if (value := values.get(step)) is not None]
    return max(known, key=lambda best: (best.value, -best.step), default=None)


def write_best(folder: Path, best: Best) -> None:
    write_new(folder / BEST, json.dumps(asdict(best), sort_keys=True).encode())


def read_best(folder: Path) -> Best | None:
    """The best checkpoint that ``folder`` names; None without one, or if the file is not ours."""
    try:
        return Best(**bounded_json.load(folder / BEST))
    except (OSError, ValueError, TypeError):
        return None


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Metrics of all steps so far, without an incomplete last line left by a kill."""
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
