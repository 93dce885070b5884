"""What the artifacts of engine stages cost: tokens from their manifests, GPU time from the times of their commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from ...errors import ArtifactMismatch, BadInput
from ...manifests import times
from ...manifests.artifact import Artifact
from ...manifests.manifest import ShardRecord
from ...manifests.schema import ASKED, TOKENS, USAGE

UNITS = ("GPU", "core")  # that have a price by the hour
MOST = 1 << 53  # tokens of a shard: beyond all real ones


@dataclass(frozen=True)
class StageCost:
    """Cost of an artifact. ``rows``: that an engine was asked about; ``tokens``: sums by column of :data:`USAGE`, with
    the number of rows that they are known of; ``gpu_seconds``, ``core_seconds``: of workers with and without a GPU,
    from their first row on, loading not included."""

    name: str
    rows: int
    tokens: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    gpu_seconds: float = 0.0
    core_seconds: float = 0.0

    def per_row(self, column: str) -> float | None:
        """Mean number of tokens, over the rows whose number is known."""
        total, known = self.tokens.get(column, (0, 0))
        return total / known if known else None

    def total(self, column: str) -> float | None:
        """Tokens of all rows that were asked about; where some rows are not counted, they are taken as the mean."""
        mean = self.per_row(column)
        return None if mean is None else mean * self.rows

    def gpu_hours_per_million(self) -> float | None:
        """GPU-hours for a million rows; None without a GPU."""
        return self.gpu_seconds / 3600 / self.rows * 1e6 if self.rows and self.gpu_seconds else None

    def price_per_million(self, prices: Mapping[str, float]) -> float | None:
        """Price of a million rows; None if the unit that it was made on has no price."""
        seconds, unit = (self.gpu_seconds, "GPU") if self.gpu_seconds else (self.core_seconds, "core")
        if unit not in prices or not self.rows or not seconds:
            return None
        return seconds / 3600 * prices[unit] / self.rows * 1e6


def stage_cost(name: str, artifact: Artifact) -> StageCost | None:
    """The cost of an artifact; None for one whose stage asks no engine, or that is older than the columns.

    Raises ArtifactMismatch if its manifest's sums cannot be.
    """
    sums = {field.name: [0, 0] for field in USAGE}
    rows = 0
    for record in artifact.committed().values():
        if TOKENS not in record.stats:
            continue
        asked, counted = _counted(artifact, record)
        rows += asked
        for column, (total, known) in counted.items():
            sums[column][0] += total
            sums[column][1] += known
    if not rows:
        return None
    on_gpus, on_cores = times.device_seconds(times.read(artifact.folder, artifact.manifest.notes).spans)
    return StageCost(name, rows, {column: (total, known) for column, (total, known) in sums.items()}, on_gpus, on_cores)


def _counted(artifact: Artifact, record: ShardRecord) -> tuple[int, dict[str, tuple[int, int]]]:
    """Rows of a shard that were asked about, and the sums of its columns with the rows that they are known of."""
    entry = record.stats[TOKENS]
    asked = entry.get(ASKED) if isinstance(entry, Mapping) else None
    counted: dict[str, tuple[int, int]] = {}
    if _is_count(asked) and asked <= record.count:
        for column in (field.name for field in USAGE):
            match entry.get(column):
                case [total, known] if _is_count(total) and _is_count(known) and known <= asked:
                    counted[column] = (total, known)
    if not _is_count(asked) or len(counted) < len(USAGE):
        raise ArtifactMismatch(
            f"{artifact.url}: shard {record.shard}: the sums of tokens in its manifest are malformed; was it edited? "
            "Restore it"
        )
    return asked, counted


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < MOST


def parse_prices(texts: Sequence[str]) -> dict[str, float]:
    """Prices by the hour, from ``UNIT=AMOUNT`` (``GPU=2.50``, ``core=0.04``). Raises BadInput."""
    prices: dict[str, float] = {}
    for text in texts:
        unit, _, amount = text.partition("=")
        try:
            price = float(amount)
        except ValueError:
            price = -1.0
        if unit not in UNITS or not 0 <= price < 1e9:
            raise BadInput(f"--price {text}: give an hour's price as {' or '.join(f'{unit}=AMOUNT' for unit in UNITS)}")
        if unit in prices:
            raise BadInput(f"--price {text}: {unit} has a price already")
        prices[unit] = price
    return prices
