"""Screening: a question stays when a model answers it with the image and does not without, in every order of options.

CapRL keeps 4 of 4 with the image and none of 4 without (arXiv 2509.22647 App. C; the released 0.75 and 0.25 read
strictly). Both arms are put in the same words with the same option to abstain, so neither is the easier one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ...manifests.shards import Row
from ...manifests.status import QuestionStatus, Status
from ...models.engines.base import ImageInput
from ...models.engines.context import quiz_room
from ...models.quiz import Question
from ...models.reader import QuizReader, ReaderConfig, Reading

QUESTIONS = "questions"  # the companion's name


class ScreenConfig(BaseModel):
    """Who may stay. All of it changes statuses, so all of it is in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_min: float = Field(1.0, ge=0, le=1, description="least share of presentations answered right with the image")
    image_inclusive: bool = Field(True, description="whether that very share is enough")
    text_max: float = Field(0.0, ge=0, le=1, description="largest share answered right without the image")
    text_inclusive: bool = Field(True, description="whether that very share is still allowed")
    reader: ReaderConfig = ReaderConfig()

    @property
    def room(self) -> int:
        """Tokens of context that a question and its answer take, beside the image."""
        return quiz_room(0, self.reader.answer_tokens)


PRESETS = {
    "strict": ScreenConfig(),
    # The released curation: four shuffled presentations, drawn answers of at most four tokens at temperature 0.1.
    "caprl": ScreenConfig(
        image_min=0.75,
        image_inclusive=False,
        text_max=0.25,
        text_inclusive=False,
        reader=ReaderConfig(orders="shuffled", presentations=4, mode="sampled", temperature=0.1, max_tokens=4),
    ),
}


@dataclass(frozen=True)
class Screener:
    """Screens rows with one reader that sees. ``model``: the name the rows carry."""

    reader: QuizReader
    model: str
    config: ScreenConfig

    async def screen(self, row: Row, image: ImageInput) -> dict[str, Any]:
        """The output row for a readable image with its questions beside it. Raises only EngineDead."""
        out = passed_on(row)
        entries = out["questions"]
        at = [place for place, entry in enumerate(entries) if entry["status"] == QuestionStatus.OK]
        if out["status"] != Status.OK or not at:
            return out
        questions = [question_of(entries[place]) for place in at]
        seen = await self.reader.look(image, questions)
        blind = await self.reader.look(None, questions)
        for place, with_image, without in zip(at, seen, blind, strict=True):
            status, reason = judge(with_image, without, self.config)
            entries[place] |= {"status": str(status), "error": reason} | _outcomes(with_image, without)
        out["screener"] = self.model
        return out | _fate([entries[place] for place in at], [*seen, *blind])


def _fate(entries: list[dict[str, Any]], readings: list[Reading]) -> dict[str, Any]:
    """A row's status by its screened questions and all of their readings.

    It is to be asked again where a request failed, and where nothing could be scored; not for some answers without a
    letter among others, which would come again.
    """
    statuses = [entry["status"] for entry in entries]
    unscored = next((entry["error"] for entry in entries if entry["status"] == QuestionStatus.UNSCORED), None)
    if unscored is not None and any(reading.errors for reading in readings):
        return {"status": str(Status.ENGINE_ERROR), "error": f"a question was not scored: {unscored}"}
    if QuestionStatus.OK in statuses:
        return {}
    if set(statuses) != {QuestionStatus.UNSCORED}:
        return {"status": str(Status.FILTERED), "error": "no question stayed"}
    refused = any(reading.refused for reading in readings)
    status = Status.REFUSED if refused else Status.ENGINE_ERROR
    return {"status": str(status), "error": f"no question could be scored: {unscored}"}


def judge(with_image: Reading, without: Reading, config: ScreenConfig) -> tuple[QuestionStatus, str | None]:
    """A question's status after both arms, with the reason where it does not stay.

    With the image an answer that names no option may be a right one in other words: it counts neither way, and where
    the outcome depends on it the question is unscored. Without the image it is what is hoped for: no answer.
    """
    errors = with_image.errors + without.errors
    if errors:
        return QuestionStatus.UNSCORED, errors[0]
    presentations, unread = len(with_image.chosen), len(with_image.chosen) - with_image.scored
    least = share_right(with_image)
    most = least + unread / presentations
    if not _above(most, config.image_min, config.image_inclusive):
        reason = f"right in {with_image.right} of {presentations} presentations with the image"
        return QuestionStatus.UNSUPPORTED, reason
    if unread and (not with_image.scored or not _above(least, config.image_min, config.image_inclusive)):
        reason = (
            f"no option named in {unread} of {presentations} presentations with the image, but {with_image.instead}"
        )
        return QuestionStatus.UNSCORED, reason
    if not _above(-share_right(without), -config.text_max, config.text_inclusive):
        reason = f"right in {without.right} of {len(without.chosen)} presentations without the image"
        return QuestionStatus.LEAKED, reason
    return QuestionStatus.OK, None


def share_right(reading: Reading) -> float:
    """Right answers over all presentations, those that name no option among them."""
    return reading.right / len(reading.chosen)


def _above(value: float, bound: float, inclusive: bool) -> bool:
    """Compared with room for rounding: two thirds of three presentations are to equal a bound of 0.6667."""
    return value > bound - 1e-4 if inclusive else value > bound + 1e-4


def _outcomes(with_image: Reading, without: Reading) -> dict[str, Any]:
    return {
        "with_image": list(with_image.chosen),
        "without_image": list(without.chosen),
        "image_accuracy": None if with_image.errors or not with_image.scored else share_right(with_image),
        "text_accuracy": None if without.errors else share_right(without),
    }


def question_of(entry: dict[str, Any]) -> Question:
    """A stored question whose status is ok. Raises ValueError where it is none."""
    return Question(entry["question"], tuple(entry["options"]), entry["answer"], entry["kind"])


def passed_on(row: Row) -> dict[str, Any]:
    """The row as it was written, its questions not screened: what becomes of rows that have none, or no image."""
    beside = row.beside.get(QUESTIONS, {})
    fate = beside if row.status is Status.OK and beside else {"status": str(row.status), "error": row.error}
    unscreened = {"with_image": None, "without_image": None, "image_accuracy": None, "text_accuracy": None}
    return {
        "key": row.key,
        "uid": row.uid,
        "status": fate["status"],
        "error": fate["error"],
        "questions": [{**entry, **unscreened} for entry in beside.get("questions") or []],
        "screener": None,
    }
