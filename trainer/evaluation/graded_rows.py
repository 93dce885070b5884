"""Rows of graded captions as typed values, and what a system's captions of one image score on a question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...errors import BadInput
from ...manifests.files import bounded_json
from ...manifests.status import Status
from ...models.quiz import rotations
from ...models.tiny.world.scenes import Scene


@dataclass(frozen=True)
class GradedQuestion:
    """A question with the number of its options and the index of the right one."""

    id: str
    kind: str
    options: int
    answer: int


@dataclass(frozen=True)
class Answer:
    """What a reader of one caption answered: ``chosen`` by presentation, and how many were what (``scored`` > 0)."""

    chosen: tuple[int | None, ...]
    right: int
    abstained: int
    scored: int

    @property
    def accuracy(self) -> float:
        """The share of scored presentations that were answered right."""
        return self.right / self.scored

    @property
    def abstention(self) -> float:
        """The share of scored presentations in which the reader abstained."""
        return self.abstained / self.scored


@dataclass(frozen=True)
class GradedCaption:
    """One caption ("" where there was none) with those answers read from it that have a score, by question id."""

    text: str
    n_tokens: int | None
    answers: Mapping[str, Answer]


@dataclass(frozen=True)
class GradedImage:
    """One row. ``image``: the uid, so that a repeated image is one unit, or the key where there is none.

    ``captions`` by system; captions that an engine error kept from being written are counted in ``excluded`` instead.
    """

    key: str
    image: str
    questions: tuple[GradedQuestion, ...]
    captions: Mapping[str, Sequence[GradedCaption]]
    excluded: Mapping[str, Counter[str]]
    scene: Scene | None


def read_row(row: Mapping[str, Any], where: str) -> GradedImage | str:
    """A row of the GRADE schema, or the reason why there is nothing to measure in it.

    Raises BadInput, naming ``where``, for a scene that cannot be read or answers that do not fit their question.
    """
    if not row["questions"]:
        return row["status"] if row["status"] != Status.OK else "no_question"
    if not row["captions"]:
        return row["status"] if row["status"] != Status.OK else "no_caption"
    questions = {each["id"]: _question(each) for each in row["questions"]}
    captions: dict[str, list[GradedCaption]] = {}
    excluded: dict[str, Counter[str]] = {}
    for each in row["captions"]:
        system = system_of(each["name"])
        of_system = captions.setdefault(system, [])
        if each["status"] == Status.ENGINE_ERROR:
            excluded.setdefault(system, Counter())[each["status"]] += 1
        else:
            of_system.append(_caption(each, questions, f"{where}: row {row['key']!r}, caption {each['name']!r}"))
    image = row["uid"] or f"key:{row['key']}"
    return GradedImage(row["key"], image, tuple(questions.values()), captions, excluded, _scene(row, where))


def system_of(name: str) -> str:
    """The system that a caption's name tells of: the prompt's name without the number of the sample, or a control."""
    return name.partition("#")[0]


def scored_answers(captions: Iterable[GradedCaption], question: str) -> list[Answer]:
    """The answers to one question, of those captions that have a score for it."""
    return [each.answers[question] for each in captions if question in each.answers]


def mean(values: Sequence[float]) -> float:
    """The mean of one value or more."""
    return sum(values) / len(values)


@cache
def places_of_answer(options: int, answer: int, presentations: int) -> tuple[int, ...]:
    """Where the right option stands in each presentation. Raises ValueError where there cannot be so many."""
    orders = rotations(options + 1, presentations)
    if len(orders) != presentations or not 0 <= answer < options:
        raise ValueError(f"{presentations} presentations of option {answer} of {options}")
    return tuple(order.index(answer) for order in orders)


def _question(record: Mapping[str, Any]) -> GradedQuestion:
    return GradedQuestion(record["id"], record["kind"] or "other", record["options"], record["answer"])


def _caption(record: Mapping[str, Any], questions: Mapping[str, GradedQuestion], where: str) -> GradedCaption:
    answers = {}
    for each in record["answers"] or ():
        question = questions.get(each["id"])
        if question is not None and each["scored"]:
            answers[question.id] = _answer(each, question, where)
    return GradedCaption(record["text"] or "", record["n_tokens"], answers)


def _answer(record: Mapping[str, Any], question: GradedQuestion, where: str) -> Answer:
    chosen = tuple(record["chosen"])
    counts = (chosen.count(question.answer), chosen.count(question.options), len(chosen) - chosen.count(None))
    if counts != (record["right"], record["abstained"], record["scored"]):
        raise BadInput(f"{where}: the counts of question {question.id} contradict its answers; grade it again")
    try:
        places_of_answer(question.options, question.answer, len(chosen))
    except ValueError as error:
        raise BadInput(f"{where}: question {question.id} has {error}; grade it again") from None
    return Answer(chosen, *counts)


def _scene(row: Mapping[str, Any], where: str) -> Scene | None:
    if row["scene"] is None:
        return None
    try:
        return Scene.from_dict(bounded_json.parse(row["scene"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{where}: the scene of row {row['key']!r} cannot be read ({error}); grade again from intact shards"
        ) from None
