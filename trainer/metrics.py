"""Named sums with counts for averaging, summed over all processes by one all-reduce; metrics of an update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import Distributed


class Metrics:
    """Float64 sums and counts by name. All processes declare the same metrics in the same order at construction."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sums = dict.fromkeys(names, 0.0)
        self._counts = dict.fromkeys(self._sums, 0.0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sums)

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Add ``value``, a sum over ``count`` items. Raises KeyError for a name that was not declared."""
        self._sums[name] += value
        self._counts[name] += count

    def extend(self, name: str, values: Sequence[float]) -> None:
        self.add(name, sum(values), len(values))

    def include(self, other: Metrics) -> None:
        """Add the sums and counts of metrics with the same names."""
        for name in self._sums:
            self.add(name, other._sums[name], other._counts[name])

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


@dataclass
class RatioRange:
    """Smallest and largest probability ratio of a step's tokens, in this process."""

    low: float = 1.0
    high: float = 1.0

    def include(self, ratios: Tensor) -> None:
        self.low, self.high = min(self.low, float(ratios.min())), max(self.high, float(ratios.max()))


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step: ``metrics``, ``counts`` over all processes; ``skipped``: reason for one that changed nothing.

    ``counts``: completions, tokens, tied, unscored, contributing, groups. ``norm``: of the gradient before clipping.
    """

    metrics: Metrics
    counts: Metrics
    ratios: RatioRange
    norm: float
    skipped: str | None


@dataclass(frozen=True)
class UpdateMetrics:
    """Metrics of an update, all of its optimizer steps, over all processes.

    ``loss``: mean over the steps; ``norm``: the largest; ``entropy``, ``kl``, ``value_loss``: means over the tokens
    computed, None where none was, and without a KL term or a critic; ``kl``: k3, whatever the loss takes. ``tokens``,
    ``tied``, ``unscored``, ``groups``: of the rollout, once.
    ``skipped``: reason for steps that changed no weights, ``steps_skipped`` of ``steps``.
    ``mismatch``: mean of |log-probability when sampled - the policy's|, before the update, over the tokens computed;
    None if none was kept. ``correction``: mean weight of a token, and ``capped``: completions (by token modes: tokens)
    whose ratio was above the cap, and so masked or truncated; None without a correction.
    """

    loss: float
    norm: float
    entropy: float | None
    kl: float | None
    value_loss: float | None
    ratio_min: float
    ratio_max: float
    tokens: int
    tied: int
    unscored: int
    skipped: str | None = None
    mismatch: float | None = None
    groups: int = 0
    steps: int = 1
    steps_skipped: int = 0
    correction: float | None = None
    capped: int | None = None


def update_metrics(steps: Sequence[OptimizerStep], epochs: int, sampling: Metrics) -> UpdateMetrics:
    """Sum up an update's steps, at least one. ``sampling``: mismatch, correction and capped, over all processes."""
    metrics, counts, ratios = Metrics(steps[0].metrics.names), Metrics(steps[0].counts.names), RatioRange()
    for step in steps:
        metrics.include(step.metrics)
        counts.include(step.counts)
        ratios.low, ratios.high = min(ratios.low, step.ratios.low), max(ratios.high, step.ratios.high)
    reasons = [step.skipped for step in steps if step.skipped is not None]
    norms = [step.norm for step in steps if math.isfinite(step.norm)]
    corrected = sampling.count("correction") > 0
    return UpdateMetrics(
        loss=metrics.total("loss") / len(steps),
        norm=max(norms, default=steps[-1].norm),
        entropy=metrics.mean("entropy"),
        kl=metrics.mean("kl"),
        value_loss=metrics.mean("value_loss"),
        ratio_min=ratios.low,
        ratio_max=ratios.high,
        # Every epoch has each group once.
        tokens=round(counts.total("tokens") / epochs),
        tied=round(counts.total("tied") / epochs),
        unscored=round(counts.total("unscored") / epochs),
        groups=round(counts.total("groups") / epochs),
        skipped=_in_words(reasons, len(steps)),
        steps=len(steps),
        steps_skipped=len(reasons),
        mismatch=sampling.mean("mismatch"),
        correction=sampling.mean("correction"),
        capped=int(sampling.total("capped")) if corrected else None,
    )


def _in_words(reasons: Sequence[str], steps: int) -> str | None:
    """Why steps were skipped, with the first reason."""
    if not reasons:
        return None
    return reasons[0] if steps == 1 else f"{len(reasons)} of {steps} optimizer steps: {reasons[0]}"
