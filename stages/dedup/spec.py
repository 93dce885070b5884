"""`capipe embed` and `capipe dedup` as stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...manifests.artifact_spec import ArtifactSpec
from ...manifests.schema import DEDUP as MARK_COLUMNS
from ...manifests.schema import HASHES as HASH_COLUMNS
from ...manifests.schema import TEXTS as TEXT_COLUMNS
from ..stage_spec import ANYTHING, MARKED, SHARDS, Output, OutputFolder, StageSpec, keys


def _of_texts(config: Mapping[str, Any], inputs: frozenset[str]) -> bool:
    return bool(config.get("texts")) or "captions" in inputs


EMBEDDINGS = ArtifactSpec("embed", "images embedded")
HASHES = ArtifactSpec("hash", "images hashed, to find repeats", HASH_COLUMNS, repeated=".*")
TEXTS = ArtifactSpec("text", "texts read, to find repeats", TEXT_COLUMNS, repeated=".*")
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
        "captions": ("captions",),
        "marks": ("marks",),
    },
    {"marks": "marked"},
    (
        Output(HASHES, "hashes", lambda config, inputs: "marks" not in inputs),
        Output(HASHES, "against", lambda config, inputs: "against" in inputs),
        Output(MARKS, "images", lambda config, inputs: _of_texts(config, inputs) and "marks" not in inputs),
        Output(TEXTS, "texts", lambda config, inputs: _of_texts(config, inputs)),
        Output(MARKS, "marked"),
    ),
    (
        OutputFolder("hashes", keys("shards")),
        OutputFolder("against", keys("against")),
        OutputFolder("images", without=keys("texts captions text-threshold per-text marks")),
        OutputFolder("texts", keys("shards texts captions")),
        OutputFolder("marked"),
    ),
    check="capipe.pipeline.commands.dedup:check",
)
