"""Asking stage: the probability of yes for each question about an image; one output row per row.

All questions of an image are asked at once, in both orders of their options, so that engines compute the image once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...manifests.schema import asked
from ...manifests.shards import Row
from ...manifests.status import Status
from ...models.engines.base import ImageInput, Prompt, Sampling
from ...models.engines.context import text_room
from ...models.yes_no import ASK, ORDERS, YesNo, YesNoConfig, YesNoReader, prompt_of
from .questions import NamedQuestion


class AskConfig(BaseModel):
    """What is asked about every image, and how. All of it affects probabilities, so all of it is in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: tuple[NamedQuestion, ...] = Field(min_length=1, description="sorted by name")
    reader: YesNoConfig = YesNoConfig()

    @model_validator(mode="after")
    def _samples(self) -> AskConfig:
        Sampling(self.reader.temperature)  # raises ValueError
        return self

    def semantic(self) -> dict[str, Any]:
        """Settings covered by the fingerprint: names, wordings and the instruction before them, and the reader's."""
        questions = {question.name: question.text for question in self.questions}
        return {"questions": questions, "instruction": ASK, **self.reader.model_dump(mode="json")}

    @property
    def schema(self) -> pa.Schema:
        return asked([question.name for question in self.questions])

    @property
    def requests(self) -> int:
        """Engine requests per image."""
        answers = self.reader.samples if self.reader.mode == "sampled" else 1
        return len({question.text for question in self.questions}) * self.reader.orders * answers

    @property
    def prompts(self) -> dict[str, Prompt]:
        """A prompt of each question, by its name, about no image in particular."""
        probe = ImageInput("probe")
        return {question.name: prompt_of(probe, question.text, ORDERS[0]) for question in self.questions}

    @property
    def room(self) -> int:
        """Context tokens for a question and its answer, without the image."""
        return text_room([prompt.text for prompt in self.prompts.values()], self.reader.answer_tokens)


@dataclass(frozen=True)
class Asker:
    """Asks the questions of ``config`` about rows."""

    reader: YesNoReader
    config: AskConfig

    async def ask(self, row: Row, image: ImageInput) -> dict[str, Any]:
        """Output row for a readable image. Raises only EngineDead; a failed request is a status."""
        questions = self.config.questions
        answers = await self.reader.ask(image, [question.text for question in questions])
        columns = {question.column: answer.probability for question, answer in zip(questions, answers, strict=True)}
        return {**passed_on(row), **columns, **_fate(questions, answers)}


def _fate(questions: Sequence[NamedQuestion], answers: Sequence[YesNo]) -> dict[str, Any]:
    """Status and error of a row, where they are not those of its input.

    It is to be retried if a request failed, or if nothing could be scored. Questions alone that got no answer would get
    none again: they are null, with the reason, in a row that is ok.
    """
    if any(answer.error for answer in answers):
        return _status(Status.ENGINE_ERROR, _reasons(questions, [answer.error for answer in answers]))
    instead = _reasons(questions, [answer.instead for answer in answers])
    if any(answer.probability is not None for answer in answers):
        return {"error": instead} if instead else {}
    refused = any(answer.refused for answer in answers)
    return _status(Status.REFUSED if refused else Status.ENGINE_ERROR, f"no question could be scored: {instead}")


def _status(status: Status, error: str) -> dict[str, Any]:
    return {"status": str(status), "error": error}


def _reasons(questions: Sequence[NamedQuestion], reasons: Sequence[str]) -> str:
    """Each reason once, after the names of its questions where it is not that of all."""
    names: dict[str, list[str]] = {}
    for question, reason in zip(questions, reasons, strict=True):
        if reason:
            names.setdefault(reason, []).append(question.name)
    if len(names) == 1 and (only := next(iter(names))) and len(names[only]) == len(questions):
        return only
    return "; ".join(f"{', '.join(whose)}: {reason}" for reason, whose in names.items())


def passed_on(row: Row) -> dict[str, Any]:
    """Output row for an input row about which nothing was asked: its own status and error, no probability."""
    return {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error}
