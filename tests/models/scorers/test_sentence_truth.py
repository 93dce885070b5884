"""Captions checked sentence by sentence: exact against the scenes of the rendered world, and nothing guessed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from capipe.models.engines.base import EngineDead, RequestError
from capipe.models.scorers.sentence_truth import CheckedCaption, LeastTrue, check_captions
from capipe.models.scorers.sentences import split_sentences
from capipe.models.tiny.train.texts.hard_negatives import Planted, plant_addition, plant_change
from capipe.models.tiny.world.scenes import scenes
from capipe.models.yes_no import YesNo, YesNoConfig, YesNoReader, sigmoid

from ...oracle.scene_engine import SURE, UNLIKELY, SceneEngine
from ...scripted import IMAGE, Scripted

TRUE = sigmoid(SURE - UNLIKELY)


@pytest.mark.parametrize("plant", [plant_change, plant_addition])
async def test_the_one_sentence_that_is_wrong_is_found_by_who_knows_the_scene(plant: Callable[..., Planted]) -> None:
    for number, scene in enumerate(scenes("heldout", 20, seed=7)):
        reader = YesNoReader(SceneEngine({IMAGE.uid: scene}), YesNoConfig())
        wrong = plant(scene, Random(number))
        true, planted, empty = await check_captions(reader, IMAGE, [wrong.original, wrong.text, ""])
        assert true.probabilities == pytest.approx([TRUE] * len(split_sentences(wrong.original)))
        summary = planted.summary()
        assert summary is not None and summary[::2] == (pytest.approx(1 - TRUE), wrong.sentence)
        assert sum(value == pytest.approx(TRUE) for value in planted.probabilities) == len(planted.answers) - 1
        assert empty == CheckedCaption(()) and empty.summary() is None and empty.unanswered is None


async def test_a_sentence_of_two_captions_is_asked_about_once() -> None:
    engine = Scripted(lambda request: [-0.1, -3.0])
    checked = await check_captions(YesNoReader(engine, YesNoConfig()), IMAGE, ["A dog. A cat.", "A cat. A bird."])
    assert len(engine.choices) == 3 * 2 and [len(caption.answers) for caption in checked] == [2, 2]
    assert checked[0].answers[1] == checked[1].answers[0]


async def test_what_has_no_answer_is_no_low_probability() -> None:
    def fails(request: object) -> Exception | list[float]:
        return RequestError("reset") if "cat" in request.prompt.text else [-0.1, -3.0]  # type: ignore[attr-defined]

    (caption,) = await check_captions(YesNoReader(Scripted(fails), YesNoConfig()), IMAGE, ["A dog. A cat."])
    assert caption.summary() is None and caption.error == "reset" and caption.probabilities[1] is None
    assert caption.unanswered == "sentence 2 of 2 has no answer but reset"
    with pytest.raises(EngineDead):
        dead = Scripted(lambda request: EngineDead("gone"))  # type: ignore[arg-type, return-value]
        await check_captions(YesNoReader(dead, YesNoConfig()), IMAGE, ["A dog."])


def test_the_least_likely_sentence_is_the_first_of_equals() -> None:
    answers = tuple(YesNo("q", value) for value in (0.9, 0.25, 0.5, 0.25))
    assert CheckedCaption(answers).summary() == LeastTrue(0.25, 0.475, 1)
