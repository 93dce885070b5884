"""Specs say what the stages and commands beside them do: names, columns, options."""

from __future__ import annotations

from typing import Any

import pytest

from capipe.pipeline.chain.options import options_of
from capipe.pipeline.jobs import annotate, grade, qa, score
from capipe.pipeline.jobs.rows import sentences
from capipe.pipeline.specs import ARTIFACTS, STAGES, command_of
from capipe.stages.dedup import marks
from capipe.stages.dedup.texts import reading
from capipe.stages.export import write
from capipe.stages.filter import joined, select
from capipe.stages.ingest import shard
from capipe.stages.stage_spec import StageSpec


@pytest.mark.parametrize(
    ("stage", "processor"),
    [
        (annotate.AnnotateStage, annotate.AnnotateProcessor),
        (qa.QuestionsStage, qa.QuestionsProcessor),
        (qa.ImportStage, qa.ImportProcessor),
        (qa.ScreenStage, qa.ScreenProcessor),
        (grade.GradeStage, grade.GradeProcessor),
        (score.ScoreStage, score.ScoreProcessor),
        (sentences.SentenceStage, sentences.SentenceProcessor),
        (sentences.CheckStage, sentences.CheckProcessor),
    ],
)
def test_an_engine_stage_writes_the_columns_of_its_spec(stage: Any, processor: Any) -> None:
    assert ARTIFACTS[stage.name].schema == processor.schema


def test_every_artifact_has_a_spec() -> None:
    named = {
        shard.STAGE,
        marks.STAGE,
        marks.HASH_STAGE,
        reading.STAGE,
        select.STAGE,
        write.STAGE,
        score.EmbedStage.name,
        joined.STAGE,
    }
    others = {"annotate", "ask", "questions", "screen", "grade", "checked", "score", "sentences", "join"}
    assert named | others == ARTIFACTS.keys()


@pytest.mark.parametrize("spec", STAGES.values(), ids=lambda spec: spec.name)
def test_a_spec_names_options_of_its_command(spec: StageSpec) -> None:
    options = options_of(command_of(spec)).keys()
    decisive = {key for part in spec.parts for key in (part.only or part.without)}
    inputs = set() if spec.name == "train" else {*spec.inputs}  # which has its inputs in a recipe of its own
    assert {*inputs, *spec.optional.values(), *decisive} - options == set()
    products = {kind for each in STAGES.values() for kind in each.products}
    assert {kind for kinds in spec.inputs.values() for kind in kinds} <= products
    folders = spec.folders({}, frozenset(spec.inputs))
    assert len(folders) == len({*folders})
