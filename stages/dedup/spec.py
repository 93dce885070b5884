"""`capipe embed` and `capipe dedup` as stages."""

from __future__ import annotations

from ...manifests.artifact_spec import ArtifactSpec
from ...manifests.schema import DEDUP as MARK_COLUMNS
from ...manifests.schema import HASHES as HASH_COLUMNS
from ..stage_spec import ANYTHING, MARKED, SHARDS, Output, OutputFolder, StageSpec, keys

EMBEDDINGS = ArtifactSpec("embed", "images embedded")
HASHES = ArtifactSpec("hash", "images hashed, to find repeats", HASH_COLUMNS, repeated=".*")
MARKS = ArtifactSpec("dedup", "repeats marked", MARK_COLUMNS, repeated="sha256|phash|width|height")

EMBED = StageSpec(
    "embed",
    "capipe.pipeline.commands.embed:embed",
    {"shards": (SHARDS,), "marks": MARKED},
    {"embeddings": ""},
    (Output(EMBEDDINGS),),
    skips="marks",
    check="capipe.pipeline.commands.embed:check",
)
DEDUP = StageSpec(
    "dedup",
    "capipe.pipeline.commands.dedup:dedup",
    {
        "shards": (SHARDS,),
        "against": ANYTHING,
        "embeddings": ("embeddings",),
        "against-embeddings": ("embeddings",),
        "scores": ("scores",),
    },
    {"marks": "marked"},
    (
        Output(HASHES, "hashes"),
        Output(HASHES, "against", lambda config, inputs: "against" in inputs),
        Output(MARKS, "marked"),
    ),
    (OutputFolder("hashes", keys("shards")), OutputFolder("against", keys("against")), OutputFolder("marked")),
    check="capipe.pipeline.commands.dedup:check",
)
