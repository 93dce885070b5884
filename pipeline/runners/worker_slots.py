"""Worker slots of a run (a GPU, an actor of a cluster): retries after failures.

A slot fails when its worker exits before it finishes a row: no memory for the model, a broken GPU. A killed engine's
memory takes seconds to be freed, hence the pauses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAUSES = (5.0, 15.0)  # seconds before the retries of a failed slot; after the last one it is abandoned


@dataclass
class WorkerSlots:
    """``size``: number of slots. ``retry_at``: due times of failed slots, monotonic clock."""

    size: int
    retry_at: dict[int, float] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)  # in a row
    _used: int = 0

    def take_unused(self) -> int | None:
        """A slot that was never used; None if there is none."""
        if self._used >= self.size:
            return None
        self._used += 1
        return self._used - 1

    def failed(self, slot: int, now: float) -> float | None:
        """Record a failure. Returns the pause before the slot is retried; None: it is abandoned."""
        failures = self.failures[slot] = self.failures.get(slot, 0) + 1
        if failures > len(PAUSES):
            return None
        self.retry_at[slot] = now + PAUSES[failures - 1]
        return PAUSES[failures - 1]

    def succeeded(self, slot: int) -> None:
        """Record that a worker in the slot finished a row."""
        self.failures.pop(slot, None)

    def take_due(self, now: float) -> list[int]:
        """Remove and return the slots whose pause is over."""
        due = [slot for slot, time in self.retry_at.items() if time <= now]
        for slot in due:
            del self.retry_at[slot]
        return due
