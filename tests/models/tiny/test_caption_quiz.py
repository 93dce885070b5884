"""What readers answer from a captioner's captions: figures by hand, and of the bundled captioner."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from capipe.models.bundled import resolve
from capipe.models.reader import Reading
from capipe.models.tiny.train.eval.caption_quiz import (
    QUESTIONS,
    SIGNS,
    QuizItem,
    accuracy,
    best_of,
    metrics,
    quiz_items,
    report,
)
from capipe.models.tiny.world.captions import dense_caption


def read(item: QuizItem, *right: bool) -> list[Reading]:
    """One presentation of each question, answered right or not."""
    return [
        Reading(question, (question.answer if good else len(question.options),))
        for question, good in zip(item.questions, right, strict=True)
    ]


def test_items_are_of_the_kind_of_scene_asked_for_and_the_same_ones_again() -> None:
    present, crowded = quiz_items(12, 0.0), quiz_items(12, 1.0)
    assert max(len(item.sample.scene.things) for item in present) <= 5
    assert min(len(item.sample.scene.things) for item in crowded) >= 6
    assert crowded == quiz_items(12, 1.0)
    assert all(len(item.questions) == len(item.kinds) == QUESTIONS for item in present)


def test_questions_about_signs_are_counted_apart() -> None:
    item = next(item for item in quiz_items(40, 0.0) if 0 < sum(kind in SIGNS for kind in item.kinds) < QUESTIONS)
    readings = [read(item, *(kind not in SIGNS for kind in item.kinds))]
    text = "A star is in the center. The background is white. A star is there."
    told = metrics([item], [text], [7], {"reader": readings})
    assert told.accuracy == {"reader": 1.0} and told.signs == {"reader": 0.0}
    assert {kind: told.by_kind[kind] for kind in item.kinds} == {kind: float(kind not in SIGNS) for kind in item.kinds}
    assert (told.tokens, told.sentences, told.longer) == (7.0, 3.0, 1.0)
    assert accuracy(readings, [item], ("no such kind",)) is None


def test_true_captions_have_no_wrong_statement_and_invented_ones_do() -> None:
    items = quiz_items(5, 1.0)
    readings = {"reader": [read(item, *[True] * QUESTIONS) for item in items]}
    captions = [dense_caption(item.sample.scene, Random(0)) for item in items]
    assert metrics(items, captions, [1] * 5, readings).wrong == 0.0
    assert metrics(items, captions, [1] * 5, readings).coverage == 1.0
    swapped = metrics(items, captions[1:] + captions[:1], [1] * 5, readings)
    assert swapped.wrong > 3 and swapped.coverage < 0.7


def test_the_best_sample_is_the_first_with_most_answers() -> None:
    items = quiz_items(2, 0.0)
    few, many = (True, False, False, False), (True, True, True, False)
    candidates = [[read(items[0], *few), read(items[1], *many)], [read(items[0], *many), read(items[1], *many)]]
    assert best_of(candidates) == [1, 0]


@pytest.mark.slow
def test_dense_captions_of_the_bundled_captioner_tell_nearly_all_and_best_of_four_more_than_one() -> None:
    measured = asyncio.run(report(resolve("tiny/captioner"), 12))
    present, crowded = measured["present"], measured["crowded"]
    assert min(present["dense"].accuracy.values()) > 0.9 > max(present["best of 4"].accuracy.values())
    assert present["best of 4"].accuracy["tiny/reader"] >= present["sample 0"].accuracy["tiny/reader"]
    assert present["oracle"].wrong == crowded["oracle"].wrong == 0.0
    assert crowded["dense"].coverage < 0.8 < present["dense"].coverage
