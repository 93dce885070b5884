"""`capipe export` as a stage."""

from __future__ import annotations

from ...manifests.artifact_spec import ArtifactSpec
from ..stage_spec import FINAL, INDEX, SHARDS, Output, OutputFolder, StageSpec, keys

EXPORTED = ArtifactSpec("export", "final shards", copies=True, repeated=".*")

EXPORT = StageSpec(
    "export",
    "capipe.pipeline.commands.export:export",
    {"artifact": (SHARDS, INDEX)},
    {FINAL: ""},
    (Output(EXPORTED),),
    (OutputFolder("", without=keys("title license language creator published")), OutputFolder(None)),
    rows="artifact",
    check="capipe.pipeline.commands.export:check",
)
