"""Training length, learning-rate schedule and curriculum levels of the bundled models."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 0.95  # decay per step of the running accuracy
PASSED = 0.9  # running accuracy of letter answers at which the next level begins
LATEST = 0.6  # share of the training after which the last level applies, whatever the accuracy


@dataclass(frozen=True)
class Progress:
    """Progress of a run, saved with its checkpoint. ``right``: running accuracy on this ``level``."""

    step: int = 0
    seconds: float = 0.0
    level: int = 1
    right: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """At most ``steps``, and ``minutes`` of wall time if set; ``lr``: matrices (Muon), ``adam_lr``: the rest."""

    seed: int = 0
    steps: int = 1_000_000
    minutes: float | None = None
    lr: float = 2.5e-3
    adam_lr: float = 1.5e-3
    warmup: int = 50
    decay: float = 0.5  # share of the training, at its end, over which the rates fall to zero

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 when training is over."""
        by_time = seconds / 60 / self.minutes if self.minutes else 0.0
        return max(by_time, step / self.steps)

    def rate(self, step: int, seconds: float) -> float:
        """Learning-rate factor: warm-up, plateau, linear decay."""
        return min(1.0, (step + 1) / self.warmup, max(0.0, 1 - self.progress(step, seconds)) / self.decay)

    def advance(self, before: Progress, seconds: float, right: float, levels: int) -> Progress:
        """The progress after a step with accuracy ``right``; a high running accuracy leads to the next level."""
        step, level = before.step + 1, before.level
        running = MEMORY * before.right + (1 - MEMORY) * right
        late = self.progress(step, seconds) > LATEST
        if level < levels and (late or running > PASSED):
            return Progress(step, seconds, levels if late else level + 1)
        return Progress(step, seconds, level, running)
