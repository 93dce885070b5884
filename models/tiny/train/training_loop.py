"""Training loop shared by the trainers: steps, weight updates and resumable checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch import load as read
from torch import save as write

from .optim import build_optimizers, set_rate
from .schedule import Progress, Schedule

Log = Callable[[str], None]
Taught = TypeVar("Taught")


class TrainingLoop(Generic[Taught]):
    """Base trainer on batches of ``Taught``; ``helpers`` are trained with the model and not exported."""

    def __init__(self, plan: Schedule, model: nn.Module, helpers: nn.Module) -> None:
        self.schedule, self.trained, self.helpers = plan, model, helpers
        self.optimizers = build_optimizers(model, plan.lr, plan.adam_lr, *helpers.parameters())
        self.progress = Progress()

    def batches(self) -> Iterator[Taught]:
        """The batches from the step of ``self.progress`` on."""
        raise NotImplementedError

    def step(self, batch: Taught, rate: float) -> dict[str, float]:
        """One update of all weights, by :meth:`update`; returns losses and accuracies by name."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Write the model's folder."""
        raise NotImplementedError

    def run(self, log: Log) -> Iterator[Progress]:
        """Train, yielding after every step (so that the caller may evaluate, save or stop)."""
        plan, start = self.schedule, time.monotonic() - self.progress.seconds
        for batch in self.batches():
            rate = plan.rate(self.progress.step, self.progress.seconds)
            report = self.step(batch, rate)
            self.progress = Progress(self.progress.step + 1, time.monotonic() - start)
            if self.progress.step % 50 == 0 or self.progress.step <= 3:
                figures = " ".join(f"{name} {value:.4f}" for name, value in report.items())
                log(f"step {self.progress.step} {self.progress.seconds:.0f}s rate {rate:.3f} {figures}")
            yield self.progress
            if plan.progress(self.progress.step, self.progress.seconds) >= 1:
                return

    def update(self, loss: Tensor, rate: float) -> float:
        """One optimizer step on ``loss`` with gradient clipping; returns the gradient norm."""
        loss.backward()
        parameters = [*self.trained.parameters(), *self.helpers.parameters()]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
        for optimizer in self.optimizers:
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "seed": self.schedule.seed,
            "progress": asdict(self.progress),
            "model": self.trained.state_dict(),
            "helpers": self.helpers.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from :meth:`state`."""
        self.trained.load_state_dict(state["model"])
        self.helpers.load_state_dict(state["helpers"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])

    def save(self, file: Path) -> None:
        """Write :meth:`state` to one file, atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write(self.state(), temporary := file.with_suffix(".partial"))
        temporary.replace(file)

    def load(self, file: Path) -> None:
        """Resume from :meth:`save`. Raises ValueError if the checkpoint has another seed."""
        state: dict[str, Any] = read(file, weights_only=True)
        if state["seed"] != self.schedule.seed:
            raise ValueError(f"{file} was trained with seed {state['seed']}, not {self.schedule.seed}")
        self.restore(state)
