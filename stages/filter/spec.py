"""`capipe filter` as a stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...manifests.artifact_spec import ArtifactSpec
from ...manifests.schema import SCORE, SELECT, SENTENCES
from ..stage_spec import INDEX, MARKED, SHARDS, Output, OutputFolder, StageSpec, keys
from .joined import STAGE as JOIN
from .select import STAGE

SCORES = ArtifactSpec("score", "captions scored against their images", SCORE, shown="scores", histograms=True)
CHECKED = ArtifactSpec("sentences", "captions checked sentence by sentence", SENTENCES, histograms=True)
SELECTION = ArtifactSpec(
    STAGE,
    "rows selected for the final shards",
    SELECT,
    own_rows=True,
    source_key="source_key",
    histograms=True,
    repeated=".*",
)

JOINED = ArtifactSpec(JOIN, "a table of the user's own joined with images")


def _makes_scores(config: Mapping[str, Any], inputs: frozenset[str]) -> bool:
    """Without scores as input, and where a model adds to those."""
    return "scores" not in inputs or any(config.get(model) for model in ("clip", "itm", "safety"))


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
        Output(CHECKED, "sentences", lambda config, inputs: "vlm" in config),
        Output(SCORES, "scores", _makes_scores),
        Output(JOINED, "joined", lambda config, inputs: False),  # below it, one for each table: no folder of a chain's
        Output(SELECTION, "shards"),
    ),
    (
        OutputFolder("sentences", only=keys("shards captions vlm vlm-engine vlm-mode vlm-arg dtype"), given="vlm"),
        OutputFolder(
            "scores",
            without=keys("keep top by text shard-size index marks scores vlm vlm-engine vlm-mode vlm-arg"),
        ),
        OutputFolder("shards"),
    ),
    optional={INDEX: "index"},
    unless={SHARDS: "index"},
    named=frozenset({"scores"}),
    selects=True,
    check="capipe.pipeline.commands.filter:check",
)
