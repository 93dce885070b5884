"""`capipe annotate` as a stage."""

from __future__ import annotations

from ...manifests.artifact_spec import ArtifactSpec
from ...manifests.schema import ANNOTATE as COLUMNS
from ..stage_spec import CHECKPOINT, MARKED, SHARDS, Output, StageSpec

CAPTIONS = ArtifactSpec("annotate", "captions written", COLUMNS, shown="captions", repeated="text")

ANNOTATE = StageSpec(
    "annotate",
    "capipe.pipeline.commands.annotate:annotate",
    {"shards": (SHARDS,), "model": (CHECKPOINT,), "captions": ("captions",), "marks": MARKED},
    {"captions": "", SHARDS: ""},
    (Output(CAPTIONS),),
    optional={SHARDS: "pack"},
    skips="marks",
    check="capipe.pipeline.commands.annotate:check",
)
