"""Bytes that a selection will write, for a plan: copied images, or an index over the original tars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.filesize import decimal

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...manifests.shards import expand
from ...stages.stage_spec import INDEX, SHARDS
from .estimate import Estimate
from .plan import Planned, located
from .recipe import Chain, ChainStage, Source

ROW_BYTES = 160  # of a row of an index, compressed, with a caption of 30 words and its scores: bench/stages/index.py


def selection_bytes(chain: Chain, stage: ChainStage, planned: Planned, estimate: Estimate, folder: Path) -> str | None:
    """A line on a stage that selects and is left to do; None for others."""
    if INDEX not in stage.command.spec.products or planned.settled:
        return None
    images = _tar_bytes(chain, stage, folder)
    copied = "images, unknown until its input is there" if images is None else f"at most {decimal(images)} of images"
    rows = "rows" if estimate.rows is None else f"about {decimal(estimate.rows * ROW_BYTES)} of rows"
    if stage.config.get(stage.command.spec.optional[INDEX]):
        return f"writes an index: {rows}; without index: true it would copy {copied} as well"
    return f"copies {copied}; with index: true it would write {rows} alone"


def _tar_bytes(chain: Chain, stage: ChainStage, folder: Path) -> int | None:
    """Size of the tars that a stage selects from, as far as they are there and their sizes known without a request."""
    total = 0
    for source in stage.inputs.get(stage.command.spec.rows, ()):
        place = source.path or _made(chain, source, folder)
        size = None if place is None else _size(place, source.first)
        if size is None:
            return None
        total += size
    return total


def _made(chain: Chain, source: Source, folder: Path) -> str | None:
    maker = chain.stage(source.stage or "")
    product = maker.product(SHARDS)
    return None if product is None else located(maker, folder, product)


def _size(place: str, first: int | None) -> int | None:
    try:
        if Artifact.exists(place):
            artifact = Artifact.open(place)
            records = list(artifact.committed().values())[:first]
            if len(records) < int(artifact.config["run"].get("shards_total") or 0) and first is None:
                return None
            files: list[Mapping[str, int]] = [record.files.get(f"{record.shard}.tar", {}) for record in records]
            return sum(int(file.get("bytes", 0)) for file in files) if records else None
        if "://" in place:
            return None
        return sum(Path(shard.url).stat().st_size for shard in expand(place)[:first])
    except (CapipeError, OSError):
        return None
