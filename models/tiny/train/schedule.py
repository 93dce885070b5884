"""How long a bundled model trains, and how its learning rates rise and fall."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 0.95  # of the running share of right answers, per step
PASSED = 0.9  # of the answers with a letter right: the next level begins
LATEST = 0.6  # of the training: from here on it is the last level, whatever was learnt


@dataclass(frozen=True)
class Progress:
    """Where a run stands; saved with its checkpoint. ``right``: of the answers on this ``level``, a running share."""

    step: int = 0
    seconds: float = 0.0
    level: int = 1
    right: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """``steps`` at most, ``minutes`` of wall time where given; ``lr`` for the matrices (Muon), ``adam_lr`` the rest."""

    seed: int = 0
    steps: int = 1_000_000
    minutes: float | None = None
    lr: float = 2.5e-3
    adam_lr: float = 1.5e-3
    warmup: int = 50
    decay: float = 0.5  # the last part of training, in which the rates fall to zero

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 when training is over."""
        by_time = seconds / 60 / self.minutes if self.minutes else 0.0
        return max(by_time, step / self.steps)

    def rate(self, step: int, seconds: float) -> float:
        """What the learning rates are multiplied with: warm-up, plateau, linear fall."""
        return min(1.0, (step + 1) / self.warmup, max(0.0, 1 - self.progress(step, seconds)) / self.decay)

    def advance(self, before: Progress, seconds: float, right: float, levels: int) -> Progress:
        """The progress after a step with ``right`` of its answers right; enough of them lead to the next level."""
        step, level = before.step + 1, before.level
        running = MEMORY * before.right + (1 - MEMORY) * right
        late = self.progress(step, seconds) > LATEST
        if level < levels and (late or running > PASSED):
            return Progress(step, seconds, levels if late else level + 1)
        return Progress(step, seconds, level, running)
