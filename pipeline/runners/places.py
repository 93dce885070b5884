"""The places of a run's workers (a GPU, an actor of a cluster): which are tried again after a failure, which given up.

A place fails when its worker ends before it finished a row: a model that finds no memory, a broken card. The memory of
an engine that was killed takes seconds to come free, hence the pauses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAUSES = (5.0, 15.0)  # seconds before a place that failed once, twice, … is tried again; after that it is given up


@dataclass
class Places:
    """``size``: how many there may be. ``due``: when those that failed are to be tried again, by a monotonic clock."""

    size: int
    due: dict[int, float] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)  # in a row
    _begun: int = 0

    def fresh(self) -> int | None:
        """A place that was never used, or None."""
        if self._begun >= self.size:
            return None
        self._begun += 1
        return self._begun - 1

    def failed(self, place: int, now: float) -> float | None:
        """The pause before this place is tried again; None: it is given up."""
        number = self.failures[place] = self.failures.get(place, 0) + 1
        if number > len(PAUSES):
            return None
        self.due[place] = now + PAUSES[number - 1]
        return PAUSES[number - 1]

    def worked(self, place: int) -> None:
        """A worker there finished a row."""
        self.failures.pop(place, None)

    def ready(self, now: float) -> list[int]:
        """Places whose pause is over; they wait no longer."""
        found = [place for place, due in self.due.items() if due <= now]
        for place in found:
            del self.due[place]
        return found
