"""What the artifacts of engine stages cost: tokens from their manifests, GPU time from the times of their commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import BadInput
from ...manifests import times
from ...manifests.artifact import Artifact
from ...manifests.schema import ASKED, TOKENS, USAGE

UNITS = ("GPU", "core")  # that have a price by the hour


@dataclass(frozen=True)
class StageCost:
    """Cost of an artifact. ``rows``: that an engine was asked about; ``tokens``: sums by column of :data:`USAGE`, with
    the number of rows that they are known of; ``gpu_seconds``, ``cpu_seconds``: of workers with and without a GPU, from
    their first row on, loading not included."""

    name: str
    rows: int
    tokens: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0

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
        seconds, unit = (self.gpu_seconds, "GPU") if self.gpu_seconds else (self.cpu_seconds, "core")
        if unit not in prices or not self.rows or not seconds:
            return None
        return seconds / 3600 * prices[unit] / self.rows * 1e6


def stage_cost(name: str, artifact: Artifact) -> StageCost | None:
    """The cost of an artifact; None for one whose stage asks no engine, or that is older than the columns."""
    sums = {field.name: [0, 0] for field in USAGE}
    rows = 0
    for record in artifact.committed().values():
        counted = record.stats.get(TOKENS)
        if not isinstance(counted, Mapping):
            continue
        for column, total in sums.items():
            total[0] += int(counted[column][0])
            total[1] += int(counted[column][1])
        rows += int(counted[ASKED])
    if not rows:
        return None
    on_gpus, on_cpus = times.device_seconds(times.read(artifact.folder, artifact.manifest.notes).spans)
    return StageCost(name, rows, {column: (total, known) for column, (total, known) in sums.items()}, on_gpus, on_cpus)


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
