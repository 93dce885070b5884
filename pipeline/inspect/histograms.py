"""Histograms of score columns for new and original captions, with the selection's thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...manifests.artifact import Artifact
from ...manifests.schema import SELECT
from ...stages.filter.select import scores_of

BINS = 60
SERIES = {"re": "new captions", "org": "original captions"}


@dataclass(frozen=True)
class Histogram:
    """Histogram of a score. ``edges``: :data:`BINS` + 1 bin edges; ``counts``: by series, ``""`` for a column without
    series; ``bounds``: thresholds, each with its series."""

    name: str
    edges: npt.NDArray[np.float64]
    counts: dict[str, npt.NDArray[np.int64]]
    bounds: tuple[tuple[str, float], ...]


def histograms(
    artifact: Artifact,
    names: Sequence[str],
    bounds: Sequence[tuple[str, float]],
    shards: Sequence[str] | None = None,
) -> list[Histogram]:
    """Histograms of the named scores that any row has. ``names``: without prefix; ``bounds``: by full column names.

    Two passes over these columns, a shard at a time: one for the range, one for the counts. ``shards``: limit to these.
    """
    shards = list(artifact.committed()) if shards is None else shards
    ranges = _ranges(artifact, shards, [column for name in names for column in _columns(name).values()])
    result = []
    for name in names:
        columns = {key: column for key, column in _columns(name).items() if column in ranges}
        if columns:
            edges = _edges([ranges[column] for column in columns.values()])
            held = tuple((key, bound) for key, column in columns.items() for named, bound in bounds if named == column)
            result.append(Histogram(name, edges, {key: np.zeros(BINS, np.int64) for key in columns}, held))
    for column, values in _values(artifact, shards, list(ranges)):
        for histogram in result:
            for key, counts in histogram.counts.items():
                if _columns(histogram.name)[key] == column:
                    counts += np.histogram(values, histogram.edges)[0]
    return result


def _columns(name: str) -> dict[str, str]:
    """Columns of a score, by series."""
    by_series = {prefix: f"{prefix}_{name}" for prefix in SERIES if f"{prefix}_{name}" in SELECT.names}
    return by_series or {"": name}


def _ranges(artifact: Artifact, shards: Sequence[str], columns: list[str]) -> dict[str, tuple[float, float]]:
    """Minimum and maximum of each column that has values, unless they are farther apart than numbers go."""
    ranges: dict[str, tuple[float, float]] = {}
    for column, values in _values(artifact, shards, columns):
        if len(values):
            low, high = ranges.get(column, (np.inf, -np.inf))
            ranges[column] = min(low, float(values.min())), max(high, float(values.max()))
    return {column: (low, high) for column, (low, high) in ranges.items() if np.isfinite(high - low)}


def _values(
    artifact: Artifact, shards: Sequence[str], columns: list[str]
) -> Iterator[tuple[str, npt.NDArray[np.float64]]]:
    """Finite values of columns, shard by shard."""
    for shard in shards:
        parquet = artifact.parquet(shard)
        known = [column for column in columns if column in parquet.schema_arrow.names]
        table = parquet.read(columns=known, use_threads=False)
        for column in known:
            values = scores_of(table, column).astype(np.float64)
            yield column, values[np.isfinite(values)]


def _edges(ranges: Sequence[tuple[float, float]]) -> npt.NDArray[np.float64]:
    """Bin edges over all ranges; series plotted together share them."""
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    return np.linspace(low, high, BINS + 1) if low < high else np.linspace(low - 0.5, high + 0.5, BINS + 1)
