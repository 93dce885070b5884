"""`capipe filter` as a stage."""

from __future__ import annotations

from ...manifests.artifact_spec import ArtifactSpec
from ...manifests.schema import SCORE, SELECT
from ..stage_spec import INDEX, MARKED, SHARDS, Output, OutputFolder, StageSpec, keys
from .select import STAGE

SCORES = ArtifactSpec("score", "captions scored against their images", SCORE, shown="scores", histograms=True)
SELECTION = ArtifactSpec(
    STAGE,
    "rows selected for the final shards",
    SELECT,
    own_rows=True,
    source_key="source_key",
    histograms=True,
    repeated=".*",
)

FILTER = StageSpec(
    "filter",
    "capipe.pipeline.commands.filter:filter_",
    {
        "shards": (SHARDS,),
        "captions": ("captions",),
        "embeddings": ("embeddings",),
        "scores": ("scores",),
        "marks": MARKED,
    },
    {SHARDS: "shards", INDEX: "shards", "scores": "scores"},
    (
        Output(SCORES, "scores", lambda config, inputs: "scores" not in inputs),
        Output(SELECTION, "shards"),
    ),
    (OutputFolder("scores", without=keys("keep top by text shard-size index marks")), OutputFolder("shards")),
    optional={INDEX: "index"},
    unless={SHARDS: "index"},
    selects=True,
    check="capipe.pipeline.commands.filter:check",
)
