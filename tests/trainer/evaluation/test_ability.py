"""Can a reader read? From captions that tell the answers, against none; and whether it prefers a place."""

from __future__ import annotations

import hashlib
from random import Random

import pytest

from capipe.errors import BadInput
from capipe.models.engines.base import ChoiceRequest
from capipe.models.quiz import Question
from capipe.models.reader import QuizReader, ReaderConfig
from capipe.models.tiny.train.texts.quiz import quiz, sample_asked
from capipe.models.tiny.world.scenes import sample_scene
from capipe.trainer.dataset import Example
from capipe.trainer.evaluation.ability import LEAST_OF_PLACE, Ability, PositionCounts, ability_of, cautions
from capipe.trainer.preflight import ability, refuse_reader

from ...scripted import Scripted, knows, pick


def examples(count: int, truth: bool = False) -> list[Example]:
    """Scenes with three questions each."""
    rng, made = Random(4), []
    for number in range(count):
        scene = sample_scene(rng, 4)
        asked = tuple(quiz(scene, sample_asked(scene, rng), rng) for _ in range(3))
        made.append(Example(f"{number:032x}", str(number), "memory://x", 0, 1, asked, scene if truth else None))
    return made


def caption_of(request: ChoiceRequest) -> str:
    text = request.prompt.text
    return text[text.index("<caption>") : text.index("</caption>")] if "<caption>" in text else ""


def reads(request: ChoiceRequest) -> list[float]:
    """Finds the question in the caption and takes what follows it."""
    question = request.prompt.text[request.prompt.text.rindex("Question: ") + 10 :].splitlines()[0]
    _, _, after = caption_of(request).partition(question)
    return knows(request, after[: after.find(".")].strip())


def guesses(request: ChoiceRequest) -> list[float]:
    """By a hash of all it is shown: any letter, whatever the caption says."""
    number = int(hashlib.sha256(request.prompt.text.encode()).hexdigest(), 16)
    return pick(request, request.choices[number % len(request.choices)])


def prefers_a(request: ChoiceRequest) -> list[float]:
    """Reads every second caption; of the others it takes A."""
    number = int(hashlib.sha256(caption_of(request).encode()).hexdigest(), 16)
    return reads(request) if number % 2 else pick(request, "A")


def reader(choose: object) -> QuizReader:
    return QuizReader(Scripted(choose), ReaderConfig())  # type: ignore[arg-type]


async def measured(choose: object, truth: bool = False) -> Ability:
    found = await ability_of(reader(choose), examples(30, truth))
    assert found is not None
    return found


async def test_who_reads_is_told_from_who_guesses() -> None:
    able, chance = await measured(reads), await measured(guesses)
    assert able.by_control["self-oracle"] == 1 and able.blind == 0 and cautions(able) == []
    assert abs(chance.gain) < 0.1 and 0.1 < chance.blind < 0.4
    (caution, *_) = cautions(chance)
    assert caution.kind == "cannot_read"
    assert caution.figures == {"self-oracle": chance.by_control["self-oracle"], "blind": chance.blind, "threshold": 0.2}
    figures = f"self-oracle {chance.by_control['self-oracle']:.3f}, blind {chance.blind:.3f}"
    assert figures in caution.text and "less than 0.20" in caution.text and "more capable reader" in caution.text


async def test_training_is_refused_with_the_figures_and_what_to_do() -> None:
    found = await ability(reader(guesses), examples(30))
    with pytest.raises(BadInput) as caught:
        refuse_reader(found, "some/reader")
    text = str(caught.value)
    assert text.startswith("preflight: some/reader: ") and f"blind {found.blind:.3f}" in text and "0.20" in text
    assert "set the quiz's `reader` in the recipe" in text and "\n" not in text
    assert refuse_reader(await ability(reader(reads), examples(30)), "r") == []
    silent = reader(lambda request: [-20.0] * len(request.choices))
    with pytest.raises(BadInput, match="scored none of the questions"):
        await ability(silent, examples(3))


async def test_where_the_truth_is_known_a_true_caption_counts_too() -> None:
    """It reads sentences, and not questions with their answers."""

    def of_truth(request: ChoiceRequest) -> list[float]:
        return knows(request) if "?" in caption_of(request) else knows(request, *caption_of(request).split())

    assert cautions(await measured(of_truth))[0].kind == "cannot_read"
    found = await measured(of_truth, truth=True)
    assert found.best == "oracle" and found.by_control["self-oracle"] == 0 and found.gain > 0.2
    assert [each.kind for each in cautions(found)] in ([], ["prefers_places"])


async def test_a_reader_that_prefers_a_place_is_warned_of_with_the_figures() -> None:
    found = await measured(prefers_a)
    assert found.gain > 0.2
    (caution,) = cautions(found)
    assert caution.kind == "prefers_places" and caution.figures["A"] - caution.figures["B"] > 0.3
    assert f"A {found.places[0]:.3f}, B {found.places[1]:.3f}" in caution.text
    (warning,) = refuse_reader(found, "some/reader")
    assert warning.startswith("warning: some/reader: the reader prefers some places")


def test_places_compare_each_question_with_itself() -> None:
    """Two options are all right, four are all wrong and alone in places D and E: no place is preferred."""
    places = PositionCounts()
    for _ in range(LEAST_OF_PLACE):
        places.add((0, 1, 2), (True, True, True))
        places.add((0, 1, 2, 3, 4), (False, None, False, False, False))
    assert set(places.accuracies()) == {0, 1, 2, 3, 4}
    assert len(set(places.accuracies().values())) == 1
    first = PositionCounts()
    for _ in range(LEAST_OF_PLACE):
        first.add((0, 1, 2), (True, False, False))
    assert first.accuracies() == pytest.approx({0: 1.0, 1: 0.0, 2: 0.0})
    beyond = PositionCounts()
    for _ in range(LEAST_OF_PLACE):
        beyond.add((0, 1, 2), (True, False, False))
        beyond.add((1, 2), (True, True))
    assert beyond.accuracies() == pytest.approx({0: 1.0, 1: 0.6 - 1 / 6, 2: 0.6 - 1 / 6}), "not 1.267"
    few = PositionCounts()
    few.add((0, 1, 2), (True, False, False))
    assert few.accuracies() == {} and PositionCounts().accuracies() == {}


def test_questions_that_anybody_answers_are_to_be_screened() -> None:
    (caution,) = cautions(Ability(0.9, {"self-oracle": 1.0}, {}))
    assert caution.kind == "cannot_read" and "screen the questions" in caution.text


async def test_nothing_scored_is_nothing_known() -> None:
    example = Example("u" * 32, "k", "memory://x", 0, 1, (Question("What?", ("a", "b"), 0),))
    assert await ability_of(reader(lambda request: [None] * 3), [example]) is None
