"""Rows that a stage skips by its marks: they cost it nothing, so neither estimates nor measured rates count them."""

from __future__ import annotations

from pathlib import Path

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...manifests.status import Status
from .plan import places_of
from .recipe import Chain, ChainStage


def has_marks(stage: ChainStage) -> bool:
    return bool(stage.inputs.get(stage.command.spec.skips))


def worked_on(chain: Chain, stage: ChainStage, rows: int, folder: Path) -> int | None:
    """Of ``rows`` input rows, those that a stage's marks leave to it, all of them without marks.

    None if the marks are not there, or not whole. At most that many if the stage reads part of what was marked.
    """
    for place in places_of(chain, stage, stage.command.spec.skips, folder):
        try:
            marks = Artifact.open(place)
            records = marks.committed().values()
            expected = int(marks.config["run"].get("shards_total") or 0)
        except CapipeError:
            return None
        if len(records) < expected:
            return None
        rows = min(rows, sum(record.rows.get(Status.OK, 0) for record in records))
    return rows
