"""Open-ended questions of sets, and a model's answers in words."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from capipe.manifests.schema import QUESTIONS, QUESTIONS_WITH_OPEN, check
from capipe.models.engines.base import EngineDead, GenerationRequest, Refused, RequestError
from capipe.stages.questions.grade import open_questions
from capipe.stages.questions.import_sets import QuestionRecord
from capipe.stages.questions.layouts import read_question
from capipe.stages.questions.match import ImageNames, QuestionIndex
from capipe.stages.questions.open_ended import (
    READ_OPEN,
    READ_OPEN_BLIND,
    OpenAnswer,
    OpenQuestion,
    OpenReader,
    open_question,
    restored,
    says_nothing,
    stored,
)

from ...scripted import Scripted

COLOR, COUNT = OpenQuestion("What color is it?", ("blue",), "color"), OpenQuestion("How many?", ("2", "two"))


def opened(**entry: Any) -> tuple[str, ...] | None:
    """The accepted answers of an entry, None if it is no open-ended question."""
    found = open_question(read_question({"question": "What is it?", **entry}))
    return None if found is None else found.answers


@pytest.mark.parametrize(
    ("entry", "answers"),
    [
        ({"answer": "a dog"}, ("a dog",)),
        ({"answer": ["a dog", "dog", "dog"]}, ("a dog", "dog")),
        ({"answer": '["a dog", "dog"]'}, ("a dog", "dog")),
        ({"answer": "['8', 'eight']", "options": "[]"}, ("8", "eight")),
        ({"answer": 8}, ("8",)),
        ({"answer": 8.0, "options": []}, ("8",)),
        ({"answer": 0.5}, ("0.5",)),
        ({"answer": "8", "correct_answer": "eight"}, ("8", "eight")),
        ({"answer": "[sic"}, ("[sic",)),
        ({"answer": " "}, None),
        ({"answer": None}, None),
        ({"answer": []}, None),
        ({"answer": {"text": "dog"}}, None),
        ({"answer": [["dog"], ["cat"]]}, None),
        ({"answer": "Cannot be determined"}, None),
        ({"answer": "x" * 2_001}, None),
        ({"answer": [str(number) for number in range(101)]}, None),
        ({"answer": "dog", "options": ["dog", "cat"]}, None),
        ({"question": "What?\nA. dog\nB. cat", "answer": "A"}, None),
        ({"question": "", "answer": "dog"}, None),
        ({"question": 3, "answer": "dog"}, None),
    ],
)
def test_answers_of_sets(entry: dict[str, Any], answers: tuple[str, ...] | None) -> None:
    assert opened(**entry) == answers


def test_a_question_is_stored_with_all_that_it_is() -> None:
    assert [restored(stored(each)) for each in (COLOR, COUNT)] == [COLOR, COUNT]
    assert stored(COLOR)["id"] == OpenQuestion(COLOR.text, COLOR.answers, "other").id != COUNT.id


async def test_answers_come_from_the_caption_or_blind() -> None:
    def says(request: GenerationRequest) -> str:
        text = request.prompt.text
        return "The answer is **blue**." if "blue star" in text and "color" in text else "Cannot tell"

    engine = Scripted(generate=says)
    reader = OpenReader(engine)
    assert await reader.read("A blue star.", [COLOR, COUNT]) == [
        OpenAnswer(COLOR, "blue"),
        OpenAnswer(COUNT, "Cannot tell"),
    ]
    assert [each.text for each in await reader.read(None, [COLOR])] == ["Cannot tell"]
    first, _, blind = (each.prompt.text for each in engine.generations)
    assert first.startswith(READ_OPEN[:60]) and first.endswith("Question: What color is it?\n")
    assert blind.startswith(READ_OPEN_BLIND[:60]) and "<caption>" not in blind
    sampling = [each.sampling for each in engine.generations]
    assert {each.temperature for each in sampling} == {0.0} and len({each.seed for each in sampling}) == 3


async def test_failures_are_answers_with_their_errors() -> None:
    def fails(request: GenerationRequest) -> str | Exception:
        return Refused("no") if "color" in request.prompt.text else RequestError("timed out")

    found = await OpenReader(Scripted(generate=fails)).read("A star.", [COLOR, COUNT])
    assert found == [OpenAnswer(COLOR, None, "no", refused=True), OpenAnswer(COUNT, None, "timed out")]
    with pytest.raises(EngineDead):
        await OpenReader(Scripted(generate=lambda request: EngineDead("gone"))).read("A star.", [COLOR])


@pytest.mark.parametrize(
    ("answer", "nothing"),
    [("Cannot tell.", True), ("", True), ("It cannot be determined", True), ("nothing", False), ("blue", False)],
)
def test_abstaining(answer: str, nothing: bool) -> None:
    assert says_nothing(answer) == nothing


# --- import ----------------------------------------------------------------------------------------------------------


def test_a_set_s_open_ended_questions_are_kept_apart_only_if_asked_for() -> None:
    entries = [
        {"question": "What color is it?", "answer": "blue"},
        {"question": "What color is it?", "answer": ["blue"]},
        {"question": "Which?", "options": ["x", "y"], "answer": "x"},
        {"question": "Why?"},
    ]
    record = QuestionRecord(("a.jpg",), tuple(map(read_question, entries)), "{}", "set:1")
    image = ImageNames("0", "/data/a.jpg", "f" * 32)
    kept = QuestionIndex([record], [image], open_ended=True).lookup(image.uid, image.key, image.source)
    assert kept is not None and kept.open_ended == (OpenQuestion("What color is it?", ("blue",)),)
    assert [entry["status"] for entry in kept.questions] == ["ok", "bad_options"]
    refused = QuestionIndex([record], [image]).lookup(image.uid, image.key, image.source)
    assert refused is not None and refused.open_ended == ()
    assert [entry["status"] for entry in refused.questions] == ["bad_options", "bad_options", "ok", "bad_options"]


def test_older_readers_of_questions_do_not_see_open_ended_ones() -> None:
    found = [{**dict.fromkeys(QUESTIONS.names), "key": "k", "status": "ok", "open_questions": [stored(COLOR)]}]
    table = pa.Table.from_pylist(found, schema=QUESTIONS_WITH_OPEN)
    check(table.schema, QUESTIONS, "the questions")
    assert open_questions(table.to_pylist()[0]) == [COLOR] and open_questions(dict.fromkeys(QUESTIONS.names)) == []
