"""Grading: a reader answers an image's questions from each of its captions, and from the controls beside them.

The controls tell what the figures mean: blind, empty and generic captions are the floor (what can be guessed), one that
is written from the truth, where the image carries its scene, is the ceiling. One made of the questions with their right
options, which needs no truth, shows whether the reader can read at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ...manifests.shards import Row
from ...manifests.status import QuestionStatus, Status
from ...models.quiz import SELF_ORACLE, Question, self_oracle
from ...models.reader import QuizReader, Reading
from ...models.tiny.world.captions import dense_caption
from ...models.tiny.world.scenes import Scene
from .screen import QUESTIONS, question_of

CAPTIONS = "captions"  # the companion's name
#: What is graded beside the captions, from the best to be expected to the worst.
CONTROLS = ("oracle", "self-oracle", "generic", "empty", "blind")


class GradeConfig(BaseModel):
    """What is graded beside the captions. All of it is in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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


@dataclass(frozen=True)
class Subject:
    """A caption to grade; ``text`` None is to answer without any."""

    name: str
    text: str | None
    n_tokens: int | None = None
    status: str = Status.OK


@dataclass(frozen=True)
class Grader:
    """Grades rows with one reader of text."""

    reader: QuizReader
    config: GradeConfig

    async def grade(self, row: Row) -> dict[str, Any]:
        """The output row for an image with its captions and questions beside it. Raises only EngineDead."""
        out = passed_on(row)
        questions = kept_questions(row.beside[QUESTIONS])
        subjects = captions_of(row.beside[CAPTIONS])
        if self.config.controls:
            subjects += controls(row, questions, self.config)
        if not questions or not subjects:
            return out
        unscored: list[str] = []
        read: list[Reading] = []
        for subject in subjects:
            readings = await self._readings(subject, questions)
            unscored += [error for reading in readings for error in reading.errors]
            read += readings
            out["captions"].append(_graded(subject, readings))
        if unscored:
            reason = f"{len(unscored)} answers were not scored: {unscored[0]}"
            return {**out, "status": str(Status.ENGINE_ERROR), "error": reason}
        if not any(each["answers"] for each in out["captions"]):
            return out
        return {**out, "status": str(Status.OK), "error": _note(read) or out["error"]}

    async def _readings(self, subject: Subject, questions: list[Question]) -> list[Reading]:
        if subject.status == Status.ENGINE_ERROR:  # there is no caption, and none is not an empty one
            return []
        return await self.reader.read(subject.text, questions)


def _note(readings: Sequence[Reading]) -> str | None:
    """What is worth knowing of a row that was graded."""
    if not any(reading.scored for reading in readings):
        return f"no answer names an option; the first is {next(reading.instead for reading in readings)}"
    cut = sum(reading.cut for reading in readings)
    return f"{cut} answers came after a thought that was cut at its limit" if cut else None


def kept_questions(beside: Mapping[str, Any]) -> list[Question]:
    """The questions of a question artifact's row that may be asked."""
    return [question_of(entry) for entry in beside["questions"] or [] if entry["status"] == QuestionStatus.OK]


def captions_of(beside: Mapping[str, Any]) -> list[Subject]:
    """The captions of an annotate row, in its order."""
    return [
        Subject(each["name"], each["text"] or "", each["n_tokens"], each["status"]) for each in beside["captions"] or []
    ]


def controls(row: Row, questions: Sequence[Question], config: GradeConfig) -> list[Subject]:
    """What a captioner's figures are held against."""
    scene = scene_of(row)
    oracle = [Subject("oracle", dense_caption(scene, Random(f"oracle:{row.uid}")))] if scene is not None else []
    told = Subject("self-oracle", self_oracle(questions, config.self_oracle))
    return [*oracle, told, Subject("generic", config.generic), Subject("empty", ""), Subject("blind", None)]


def scene_of(row: Row) -> Scene | None:
    """The truth about a rendered image, which its metadata carries; None for any other image."""
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
    """The row without any caption graded: its questions, and the status of whatever kept it from being graded."""
    scene = scene_of(row)
    fates = [row.beside[name] for name in (QUESTIONS, CAPTIONS) if name in row.beside]
    fate: Mapping[str, Any] = {"status": str(row.status), "error": row.error}
    if row.status is Status.OK:
        fate = next((each for each in fates if each["status"] != Status.OK), fate)
    questions = kept_questions(row.beside[QUESTIONS]) if QUESTIONS in row.beside else []
    return {
        "key": row.key,
        "uid": row.uid,
        "status": fate["status"],
        "error": fate["error"],
        "questions": [
            {"id": each.id, "kind": each.kind, "options": len(each.options), "answer": each.answer}
            for each in questions
        ],
        "captions": [],
        "scene": None if scene is None else json.dumps(scene.to_dict(), sort_keys=True),
    }
