"""`capipe ask` as a stage."""

from __future__ import annotations

from ...manifests.artifact_spec import ArtifactSpec
from ..stage_spec import CHECKPOINT, MARKED, SHARDS, Output, StageSpec

#: Columns depend on the questions; see :func:`...manifests.schema.asked`.
ANSWERS = ArtifactSpec("ask", "yes-or-no questions answered", shown="scores", histograms=True)

ASK = StageSpec(
    "ask",
    "capipe.pipeline.commands.ask:ask",
    {"shards": (SHARDS,), "model": (CHECKPOINT,), "marks": MARKED},
    {"scores": ""},
    (Output(ANSWERS),),
    skips="marks",
    check="capipe.pipeline.commands.ask:check",
)
