"""`capipe render` and `capipe ingest` as stages."""

from __future__ import annotations

from ...manifests.artifact_spec import ArtifactSpec
from ...manifests.schema import INGEST as COLUMNS
from ..stage_spec import ANYTHING, PICTURES, SHARDS, Output, StageSpec
from .shard import STAGE

IMAGES = ArtifactSpec(STAGE, "images checked and hashed", COLUMNS, own_rows=True, shown="text")

RENDER = StageSpec(
    "render",
    "capipe.pipeline.commands.ingest:render",
    {},
    {PICTURES: ""},
    rows="",
    check="capipe.pipeline.commands.ingest:check_render",
)
INGEST = StageSpec(
    "ingest",
    "capipe.pipeline.commands.ingest:ingest",
    {"sources": ANYTHING},
    {SHARDS: ""},
    (Output(IMAGES),),
    rows="sources",
    check="capipe.pipeline.commands.ingest:check",
)
