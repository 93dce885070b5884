"""Caption grading: a reader answers an image's questions from each of its captions, and from control captions.

The controls give the scale: blind, empty and generic captions are the floor (guessing); the oracle caption, written
from ground truth if the image has its scene, is the ceiling. The self-oracle caption, made of the questions with their
right options, needs no ground truth and measures the reader alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from ...manifests.configuration import Growing
from ...manifests.shards import Row
from ...manifests.status import QuestionStatus, Status
from ...models.quiz import SELF_ORACLE, Question, self_oracle
from ...models.reader import QuizReader, Reading
from ...models.tiny.world.captions import dense_caption
from ...models.tiny.world.scenes import Scene
from .open_ended import OpenAnswer, OpenQuestion, OpenReader, restored, stored
from .screen import QUESTIONS, question_of
from .word_budgets import budget_of, budgeted, cut

CAPTIONS = "captions"  # name of the companion artifact
#: Control captions, graded beside the captions, from the best expected to the worst.
CONTROLS = ("oracle", "self-oracle", "generic", "empty", "blind")


class GradeConfig(Growing):
    """Options of grading and its controls. All of them are in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later = ("words",)

    presentations: int | None = Field(
        None, ge=1, description="cyclic orders in which a question is put; all by default"
    )
    controls: bool = Field(
        True, description="grade blind, empty, generic, self-oracle and, where truth is known, oracle captions too"
    )
    generic: str = Field(
        "The image shows several objects on a plain background.",
        min_length=1,
        description="a caption that fits any image",
    )
    self_oracle: str = Field(
        SELF_ORACLE,
        pattern=r"^[^{}]*\{question\}[^{}]*\{answer\}[^{}]*$",
        description="how a question and its right option stand in the caption that tells all answers",
    )
    words: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="budgets: each caption is graded cut at so many words, too"
    )

    @field_validator("words")
    @classmethod
    def _budgets(cls, words: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(words)))  # the order changes nothing


@dataclass(frozen=True)
class Subject:
    """A caption to grade; ``text`` None: answer without a caption."""

    name: str
    text: str | None
    n_tokens: int | None = None
    status: str = Status.OK


@dataclass(frozen=True)
class Grader:
    """Grades rows with a text-only reader."""

    reader: QuizReader
    config: GradeConfig
    open_reader: OpenReader | None = None  # answers open-ended questions, if they are asked

    async def grade(self, row: Row) -> dict[str, Any]:
        """Output row for an image with its captions and questions. Raises only EngineDead."""
        out = passed_on(row)
        questions = kept_questions(row.beside[QUESTIONS])
        subjects = within_budgets(captions_of(row.beside[CAPTIONS]), self.config.words)
        if self.config.controls:
            subjects += controls(row, questions, self.config)
        opened = open_questions(row.beside[QUESTIONS]) if self.open_reader is not None else []
        if not subjects or not (questions or opened):
            return out
        unscored: list[str] = []
        read: list[Reading] = []
        of_text: dict[str | None, list[Reading]] = {}
        for subject in subjects:
            readings = await self._readings(subject, questions, of_text)
            unscored += [error for reading in readings for error in reading.errors]
            read += readings
            out["captions"].append(_graded(subject, readings))
        if opened:
            answers = await self._answers(subjects, opened)
            unscored += [answer.error for _, answer in answers if answer.error and not answer.refused]
            out["open_questions"] = [stored(question) for question in opened]
            out["open_answers"] = [
                {"name": name, "id": answer.question.id, "answer": answer.text} for name, answer in answers
            ]
        if unscored:
            reason = f"{len(unscored)} answers were not scored: {unscored[0]}"
            return {**out, "status": str(Status.ENGINE_ERROR), "error": reason}
        if not opened and not any(graded["answers"] for graded in out["captions"]):
            return out
        return {**out, "status": str(Status.OK), "error": _note(read) or out["error"]}

    async def _answers(
        self, subjects: Sequence[Subject], questions: Sequence[OpenQuestion]
    ) -> list[tuple[str, OpenAnswer]]:
        """Answers in words from each caption, by its name; the self-oracle tells none of these questions'."""
        assert self.open_reader is not None
        found: list[tuple[str, OpenAnswer]] = []
        of_text: dict[str | None, list[OpenAnswer]] = {}
        for subject in subjects:
            if subject.status == Status.ENGINE_ERROR or subject.name == "self-oracle":
                continue
            if budget_of(subject.name) is None or subject.text not in of_text:
                of_text[subject.text] = await self.open_reader.read(subject.text, questions)
            found += [(subject.name, answer) for answer in of_text[subject.text]]
        return found

    async def _readings(
        self, subject: Subject, questions: list[Question], of_text: dict[str | None, list[Reading]]
    ) -> list[Reading]:
        """Answers from a caption. ``of_text``: those so far; a caption within its budget is not asked about again."""
        if subject.status == Status.ENGINE_ERROR:  # no caption at all, which differs from an empty one
            return []
        if budget_of(subject.name) is not None and subject.text in of_text:
            return of_text[subject.text]
        readings = await self.reader.read(subject.text, questions)
        of_text[subject.text] = readings
        return readings


def _note(readings: Sequence[Reading]) -> str | None:
    """Note on a graded row: no readable answer, or truncated thoughts."""
    if readings and not any(reading.scored for reading in readings):
        return f"no answer names an option; the first is {next(reading.instead for reading in readings)}"
    cut = sum(reading.cut for reading in readings)
    return f"{cut} answers came after a thought that was cut at its limit" if cut else None


def kept_questions(beside: Mapping[str, Any]) -> list[Question]:
    """Usable questions of a question artifact's row."""
    return [question_of(entry) for entry in beside["questions"] or [] if entry["status"] == QuestionStatus.OK]


def open_questions(beside: Mapping[str, Any]) -> list[OpenQuestion]:
    """Open-ended questions of a question artifact's row; those that were imported without them have none."""
    return [restored(entry) for entry in beside.get("open_questions") or []]


def captions_of(beside: Mapping[str, Any]) -> list[Subject]:
    """Captions of an annotate row, in order."""
    return [
        Subject(entry["name"], entry["text"] or "", entry["n_tokens"], entry["status"])
        for entry in beside["captions"] or []
    ]


def within_budgets(captions: Sequence[Subject], words: Sequence[int]) -> list[Subject]:
    """``captions``, and after them each one cut at each number of ``words``; of those cut no token count is known."""
    return [*captions, *(_within(caption, budget) for budget in words for caption in captions)]


def _within(caption: Subject, words: int) -> Subject:
    text = cut(caption.text or "", words)
    n_tokens = caption.n_tokens if text == caption.text else None
    return Subject(budgeted(caption.name, words), text, n_tokens, caption.status)


def controls(row: Row, questions: Sequence[Question], config: GradeConfig) -> list[Subject]:
    """Control captions to compare a captioner with."""
    scene = scene_of(row)
    oracle = [Subject("oracle", dense_caption(scene, Random(f"oracle:{row.uid}")))] if scene is not None else []
    answered = Subject("self-oracle", self_oracle(questions, config.self_oracle))
    return [*oracle, answered, Subject("generic", config.generic), Subject("empty", ""), Subject("blind", None)]


def scene_of(row: Row) -> Scene | None:
    """Ground-truth scene of a rendered image, from its metadata; None for other images."""
    try:
        return Scene.from_dict((row.meta or {})["scene"])
    except (KeyError, TypeError, ValueError):
        return None


def _graded(subject: Subject, readings: list[Reading]) -> dict[str, Any]:
    answers = [
        {
            "id": reading.question.id,
            "chosen": list(reading.chosen),
            "right": reading.right,
            "abstained": reading.abstained,
            "scored": reading.scored,
        }
        for reading in readings
    ]
    return {
        "name": subject.name,
        "text": subject.text,
        "n_tokens": subject.n_tokens,
        "status": str(subject.status),
        "answers": answers,
    }


def passed_on(row: Row) -> dict[str, Any]:
    """Output row without grades: its questions, and the status that prevented grading."""
    scene = scene_of(row)
    fates = [row.beside[name] for name in (QUESTIONS, CAPTIONS) if name in row.beside]
    fate: Mapping[str, Any] = {"status": str(row.status), "error": row.error}
    if row.status is Status.OK:
        fate = next((entry for entry in fates if entry["status"] != Status.OK), fate)
    questions = kept_questions(row.beside[QUESTIONS]) if QUESTIONS in row.beside else []
    return {
        "key": row.key,
        "uid": row.uid,
        "status": fate["status"],
        "error": fate["error"],
        "questions": [
            {"id": entry.id, "kind": entry.kind, "options": len(entry.options), "answer": entry.answer}
            for entry in questions
        ],
        "captions": [],
        "scene": None if scene is None else json.dumps(scene.to_dict(), sort_keys=True),
    }
