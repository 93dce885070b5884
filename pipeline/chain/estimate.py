"""Row counts and cost of a chain's stages.

Rows are counted where possible, else taken from the recipe. Rates are those measured in this folder, else the recipe's,
with the source that it states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...manifests.files.image_types import IMAGE_EXTENSIONS
from ...manifests.files.storage import open_parquet
from ..inspect.chain_state import ChainState
from ..inspect.costs import stage_cost
from .plan import Planned, artifact_folders, committed_rows, located
from .recipe import Chain, ChainStage, Source
from .skipped import has_marks, worked_on

MACHINE = "machine"  # the unit of rates measured here, unless the recipe names another
_SHARD = 10_000  # ingest's default


@dataclass(frozen=True)
class Cost:
    """``rate``: rows per second of all devices; ``hours``: wall time. ``source``: origin of the rate."""

    rate: float
    devices: int
    unit: str
    hours: float
    source: str

    @property
    def device_hours(self) -> float:
        return self.hours * self.devices

    def price(self, prices: Mapping[str, float]) -> float | None:
        """Its price, by those of an hour of a unit; None if its unit has none."""
        return self.device_hours * prices[self.unit] if self.unit in prices else None

    def line(self, rows: int, prices: Mapping[str, float] | None = None) -> str:
        text = f"{rows:,} / {self.rate:,.4g} a second = {shown(self.hours)}"
        if self.unit == MACHINE:
            return f"{text}; {self.source}"
        many = "s" if self.devices > 1 else ""
        text += f" on {self.devices} {self.unit}{many}, {self.device_hours:,.1f} {self.unit}-hours"
        price = self.price(prices or {})
        if price is not None and rows:
            text += f" at {price:,.2f}, {price / rows * 1e6:,.2f} per million rows"
        return f"{text}; {self.source}"


@dataclass(frozen=True)
class Estimate:
    """Rows into a stage (``rows``) and out of it (``leaves``), None if unknown; ``at_most…``: it is an upper bound.

    Rows that its marks leave out are not among ``rows``, as they cost nothing, but leave it.
    """

    rows: int | None
    at_most_in: bool
    leaves: int | None
    at_most: bool
    cost: Cost | None


def estimate(
    chain: Chain, planned: Mapping[str, Planned], folder: Path, state: ChainState | None
) -> dict[str, Estimate]:
    """Estimates of all stages by name, in the chain's order."""
    estimates: dict[str, Estimate] = {}
    for stage in chain.stages:
        known = state.stage(stage.name) if state is not None else None
        rows, at_most = _rows(chain, stage, estimates)
        leaves, fewer = rows, at_most or stage.command.spec.selects
        if planned[stage.name].settled and (counts := _main(stage, folder)) is not None:
            rows, at_most, fewer = sum(counts.values()), False, False
            leaves = counts.get("ok", 0) if stage.command.spec.selects else rows
        elif has_marks(stage):
            rows, at_most = _left(chain, stage, estimates, planned, folder)
        cost = _cost(stage, rows, known.measured if known else None)
        estimates[stage.name] = Estimate(rows, at_most, leaves, fewer, cost)
    return estimates


def _main(stage: ChainStage, folder: Path) -> dict[str, int] | None:
    places = artifact_folders(stage)
    return committed_rows(located(stage, folder, places[-1])) if places else None


def _rows(chain: Chain, stage: ChainStage, before: Mapping[str, Estimate]) -> tuple[int | None, bool]:
    """Number of input rows, and whether it is an upper bound."""
    if stage.recipe is not None:
        return stage.recipe.steps * stage.recipe.rollout.images, False
    if stage.command.name == "render":
        return int(stage.config.get("images") or 400), False
    if stage.expects is not None:
        return stage.expects, False
    total, at_most = 0, False
    for source in stage.inputs.get(stage.command.spec.rows, ()):
        if source.stage is None:
            count = _counted(source)
        else:
            count, at_most = before[source.stage].leaves, at_most or before[source.stage].at_most
            if source.first is not None and count is not None:
                maker = chain.stage(source.stage)
                count = min(count, source.first * int(maker.config.get("shard-size") or _SHARD))
        if count is None:
            return None, False
        total += count
    return total, at_most


def _left(
    chain: Chain, stage: ChainStage, before: Mapping[str, Estimate], planned: Mapping[str, Planned], folder: Path
) -> tuple[int | None, bool]:
    """Number of rows that marks leave to a stage, and whether it is an upper bound.

    Counted if the marks are made; else what the recipe expects, or all rows.
    """
    rows, at_most = _rows(chain, replace(stage, expects=None), before)
    marks = stage.inputs[stage.command.spec.skips]
    if rows is not None and all(source.stage is None or planned[source.stage].settled for source in marks):
        left = worked_on(chain, stage, rows, folder)
        if left is not None:
            part = any(source.first for source in stage.inputs.get(stage.command.spec.rows, ()))
            return left, at_most or part
    return (rows, True) if stage.expects is None else (stage.expects, False)


def _counted(source: Source) -> int | None:
    """Number of rows of external data, if it is known without reading them."""
    path = source.path or ""
    try:
        if Artifact.exists(path):
            records = list(Artifact.open(path).committed().values())
            return sum(record.count for record in records[: source.first])
    except CapipeError:
        return None
    local = Path(path)
    if local.is_dir():
        names = [file.name for file in local.rglob("*") if file.is_file()]
        images = sum(name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for name in names)
        return images or None
    if local.is_file() and local.suffix == ".parquet":
        with open_parquet(path) as parquet:
            return int(parquet.metadata.num_rows)
    return None


def _cost(stage: ChainStage, rows: int | None, measured: Mapping[str, float] | None) -> Cost | None:
    devices, unit = (stage.rate.devices, stage.rate.unit) if stage.rate else (1, MACHINE)
    if rows is None:
        return None
    if measured and measured.get("rows") and measured.get("seconds"):
        rate, source = measured["rows"] / measured["seconds"], "measured here, start included"
    elif stage.rate is not None:
        rate, source = stage.rate.per_device * devices, stage.rate.source
    else:
        return None
    return Cost(rate, devices, unit, rows / rate / 3600, source)


def cost_so_far(stage: ChainStage, folder: Path, prices: Mapping[str, float]) -> str:
    """Tokens that a row cost so far, and the price of a million, by the stage's artifacts in this folder; empty if
    there are none."""
    costs, parts = [], []
    for place in artifact_folders(stage):
        url = located(stage, folder, place)
        try:
            if Artifact.exists(url) and (cost := stage_cost(stage.name, Artifact.open(url))) is not None:
                costs.append(cost)
        except CapipeError as error:
            return f"what a row cost is unknown: {error}"
    for column, what in (("prompt_tokens", "prompt"), ("image_tokens", "image"), ("output_tokens", "output")):
        means = [mean for cost in costs if (mean := cost.per_row(column)) is not None]
        if means:
            parts.append(f"{sum(means):,.1f} {what}")
    priced = [price for cost in costs if (price := cost.price_per_million(prices)) is not None]
    told = f"; {sum(priced):,.2f} per million rows, start not included" if priced and len(priced) == len(costs) else ""
    return f"a row cost {', '.join(parts)} tokens so far{told}" if parts else ""


def shown(hours: float) -> str:
    """A duration for display."""
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} s"
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:,.1f} h"
