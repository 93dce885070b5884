"""A run's worker slots (a GPU, an actor of a cluster): which are retried after a failure, and which given up.

A slot fails when its worker exits before it finished a row: no memory for the model, a broken card. The memory of a
killed engine takes seconds to come free, hence the pauses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAUSES = (5.0, 15.0)  # seconds before a slot that failed once, twice, … is retried; after that it is given up


@dataclass
class WorkerSlots:
    """``size``: slots in all. ``retry_at``: when failed slots are due, by a monotonic clock."""

    size: int
    retry_at: dict[int, float] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)  # in a row
    _used: int = 0

    def take_unused(self) -> int | None:
        """A slot that was never used, or None."""
        if self._used >= self.size:
            return None
        self._used += 1
        return self._used - 1

    def failed(self, slot: int, now: float) -> float | None:
        """The pause before the slot is retried; None: it is given up."""
        failures = self.failures[slot] = self.failures.get(slot, 0) + 1
        if failures > len(PAUSES):
            return None
        self.retry_at[slot] = now + PAUSES[failures - 1]
        return PAUSES[failures - 1]

    def succeeded(self, slot: int) -> None:
        """A worker there finished a row."""
        self.failures.pop(slot, None)

    def take_due(self, now: float) -> list[int]:
        """Slots whose pause is over; removed from ``retry_at``."""
        due = [slot for slot, time in self.retry_at.items() if time <= now]
        for slot in due:
            del self.retry_at[slot]
        return due
