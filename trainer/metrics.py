"""Named sums with counts for averaging, summed over all processes by one all-reduce."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from .distributed import Distributed


class Metrics:
    """Float64 sums and counts by name. All processes declare the same metrics in the same order at construction."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sums = dict.fromkeys(names, 0.0)
        self._counts = dict.fromkeys(self._sums, 0.0)

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Add ``value``, a sum over ``count`` items. Raises KeyError for a name that was not declared."""
        self._sums[name] += value
        self._counts[name] += count

    def extend(self, name: str, values: Sequence[float]) -> None:
        self.add(name, sum(values), len(values))

    def over(self, processes: Distributed) -> Metrics:
        """Metrics summed over all processes, equal on each."""
        local = torch.tensor([*self._sums.values(), *self._counts.values()], dtype=torch.float64)
        totals = processes.sum(local).tolist()
        metrics = Metrics(self._sums)
        metrics._sums = dict(zip(self._sums, totals[: len(self._sums)], strict=True))
        metrics._counts = dict(zip(self._sums, totals[len(self._sums) :], strict=True))
        return metrics

    def total(self, name: str) -> float:
        return self._sums[name]

    def count(self, name: str) -> int:
        return int(self._counts[name])

    def mean(self, name: str) -> float | None:
        """Sum divided by count; None without items."""
        return self._sums[name] / self._counts[name] if self._counts[name] else None

    def finite(self) -> bool:
        return all(map(math.isfinite, self._sums.values()))
