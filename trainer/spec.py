"""`capipe train` as a stage."""

from __future__ import annotations

from ..stages.stage_spec import CHECKPOINT, SHARDS, StageSpec

TRAIN = StageSpec(
    "train",
    "capipe.pipeline.commands.train:train",
    {
        "shards": (SHARDS,),
        "questions": ("questions",),
        "captions": ("captions",),
        "validation-shards": (SHARDS,),
        "validation-questions": ("questions",),
        "model": (CHECKPOINT,),
    },
    {CHECKPOINT: ""},  # the last checkpoint in its folder
)
