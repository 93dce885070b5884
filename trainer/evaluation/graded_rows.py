"""Typed access to rows of graded captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ...errors import BadInput
from ...manifests.files import bounded_json
from ...manifests.status import Status
from ...models.quiz import rotations
from ...models.tiny.world.scenes import Scene


@dataclass(frozen=True)
class GradedQuestion:
    """A question with its number of options and the index of the right one."""

    id: str
    kind: str
    options: int
    answer: int


@dataclass(frozen=True)
class Answer:
    """A reader's answers from one caption: ``chosen`` option by presentation, and counts (``scored`` > 0)."""

    chosen: tuple[int | None, ...]
    right: int
    abstained: int
    scored: int

    @property
    def accuracy(self) -> float:
        """Share of scored presentations answered right."""
        return self.right / self.scored

    @property
    def abstention(self) -> float:
        """Share of scored presentations in which the reader abstained."""
        return self.abstained / self.scored


@dataclass(frozen=True)
class OpenEndedAnswer:
    """An answer in words from the caption of a name to a question; ``said``: None if it was declined, or failed."""

    caption: str
    id: str
    question: str
    accepted: tuple[str, ...]
    said: str | None


@dataclass(frozen=True)
class GradedCaption:
    """One caption ("" if there was none) with its scored answers, by question id."""

    text: str
    n_tokens: int | None
    answers: Mapping[str, Answer]


@dataclass(frozen=True)
class GradedImage:
    """One row. ``image``: the uid, so that a repeated image is one unit, or the key without a uid.

    ``captions``: by system; captions that failed with an engine error are counted in ``excluded`` instead.
    ``open_ended``: by system, answers in words from all of its captions.
    """

    key: str
    image: str
    questions: tuple[GradedQuestion, ...]
    captions: Mapping[str, Sequence[GradedCaption]]
    excluded: Mapping[str, Counter[str]]
    scene: Scene | None
    open_ended: Mapping[str, Sequence[OpenEndedAnswer]] = field(default_factory=dict)


def read_row(row: Mapping[str, Any], where: str) -> GradedImage | str:
    """Parse a row of the GRADE schema; returns the reason instead if there is nothing to measure.

    Raises BadInput, naming ``where``, for a scene that cannot be read or answers that do not fit their question.
    """
    if not row["questions"] and not row.get("open_questions"):
        return row["status"] if row["status"] != Status.OK else "no_question"
    if not row["captions"]:
        return row["status"] if row["status"] != Status.OK else "no_caption"
    questions = {question["id"]: _question(question) for question in row["questions"] or ()}
    captions: dict[str, list[GradedCaption]] = {}
    excluded: dict[str, Counter[str]] = {}
    for caption in row["captions"]:
        system = system_of(caption["name"])
        of_system = captions.setdefault(system, [])
        if caption["status"] == Status.ENGINE_ERROR:
            excluded.setdefault(system, Counter())[caption["status"]] += 1
        else:
            of_system.append(_caption(caption, questions, f"{where}: row {row['key']!r}, caption {caption['name']!r}"))
    image = row["uid"] or f"key:{row['key']}"
    asked = tuple(questions.values())
    return GradedImage(row["key"], image, asked, captions, excluded, _scene(row, where), _open_ended(row))


def system_of(name: str) -> str:
    """System of a caption's name: the prompt's name without the sample number, or a control."""
    return name.partition("#")[0]


def scored_answers(captions: Iterable[GradedCaption], question: str) -> list[Answer]:
    """Scored answers to one question from several captions."""
    return [caption.answers[question] for caption in captions if question in caption.answers]


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value."""
    return sum(values) / len(values)


@cache
def places_of_answer(options: int, answer: int, presentations: int, last: bool = False) -> tuple[int, ...]:
    """Position of the right option in each presentation; ``last``: the option to abstain does not change places.

    Raises ValueError for an impossible number of presentations.
    """
    orders = rotations(options if last else options + 1, presentations)
    if len(orders) != presentations or not 0 <= answer < options:
        raise ValueError(f"{presentations} presentations of option {answer} of {options}")
    return tuple(order.index(answer) for order in orders)


def _open_ended(row: Mapping[str, Any]) -> dict[str, list[OpenEndedAnswer]]:
    """Answers in words by system; those to unknown questions are left out."""
    asked = {question["id"]: question for question in row.get("open_questions") or ()}
    found: dict[str, list[OpenEndedAnswer]] = {}
    for answer in row.get("open_answers") or ():
        if (question := asked.get(answer["id"])) is not None:
            name, accepted = answer["name"], tuple(question["answers"])
            entry = OpenEndedAnswer(name, answer["id"], question["question"], accepted, answer["answer"])
            found.setdefault(system_of(name), []).append(entry)
    return found


def _question(record: Mapping[str, Any]) -> GradedQuestion:
    return GradedQuestion(record["id"], record["kind"] or "other", record["options"], record["answer"])


def _caption(record: Mapping[str, Any], questions: Mapping[str, GradedQuestion], where: str) -> GradedCaption:
    answers = {}
    for answer in record["answers"] or ():
        question = questions.get(answer["id"])
        if question is not None and answer["scored"]:
            answers[question.id] = _answer(answer, question, where)
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
