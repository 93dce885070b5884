"""Question screening: keep questions that a model answers with the image and not without, in every option order.

CapRL keeps 4 of 4 with the image and 0 of 4 without (arXiv 2509.22647 App. C; the released 0.75 and 0.25 with strict
comparisons). Both arms use the same prompt with the same option to abstain, so neither is easier.
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

QUESTIONS = "questions"  # name of the companion artifact


class ScreenConfig(BaseModel):
    """Criteria for keeping a question. All of them affect statuses, so all of them are in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_min: float = Field(1.0, ge=0, le=1, description="least share of presentations answered right with the image")
    image_inclusive: bool = Field(True, description="whether that very share is enough")
    text_max: float = Field(0.0, ge=0, le=1, description="largest share answered right without the image")
    text_inclusive: bool = Field(True, description="whether that very share is still allowed")
    reader: ReaderConfig = ReaderConfig()

    @property
    def room(self) -> int:
        """Context tokens for a question and its answer, without the image."""
        return quiz_room(0, self.reader.answer_tokens)


PRESETS = {
    "strict": ScreenConfig(),
    # The released curation: four shuffled presentations, sampled answers of at most four tokens at temperature 0.1.
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
    """Screens rows with a vision-language reader. ``model``: its name in the output rows."""

    reader: QuizReader
    model: str
    config: ScreenConfig

    async def screen(self, row: Row, image: ImageInput) -> dict[str, Any]:
        """Output row for a readable image with its questions. Raises only EngineDead."""
        out = passed_on(row)
        entries = out["questions"]
        at = [index for index, entry in enumerate(entries) if entry["status"] == QuestionStatus.OK]
        if out["status"] != Status.OK or not at:
            return out
        questions = [question_of(entries[index]) for index in at]
        seen = await self.reader.look(image, questions)
        blind = await self.reader.look(None, questions)
        for index, with_image, without in zip(at, seen, blind, strict=True):
            status, reason = judge(with_image, without, self.config)
            entries[index] |= {"status": str(status), "error": reason} | _outcomes(with_image, without)
        out["screener"] = self.model
        return out | _fate([entries[index] for index in at], [*seen, *blind])


def _fate(entries: list[dict[str, Any]], readings: list[Reading]) -> dict[str, Any]:
    """Status of a row from its screened questions and all of their readings.

    A retry is due if a request failed, or if nothing could be scored; not if only some answers name no option, as they
    would repeat.
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
    """Status of a question after both arms, with the reason if it is not kept.

    With the image, an answer that names no option may be a correct one in other words: it counts neither way, and if
    the outcome depends on it, the question is unscored. Without the image it is the desired result: no answer.
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
    """Fraction of right answers among all presentations, including those that name no option."""
    return reading.right / len(reading.chosen)


def _above(value: float, bound: float, inclusive: bool) -> bool:
    """Comparison with a tolerance for rounding: 2 of 3 presentations equal a bound of 0.6667."""
    return value > bound - 1e-4 if inclusive else value > bound + 1e-4


def _outcomes(with_image: Reading, without: Reading) -> dict[str, Any]:
    return {
        "with_image": list(with_image.chosen),
        "without_image": list(without.chosen),
        "image_accuracy": None if with_image.errors or not with_image.scored else share_right(with_image),
        "text_accuracy": None if without.errors else share_right(without),
    }


def question_of(entry: dict[str, Any]) -> Question:
    """The question of a stored entry with status ok. Raises ValueError if it is invalid."""
    return Question(entry["question"], tuple(entry["options"]), entry["answer"], entry["kind"])


def passed_on(row: Row) -> dict[str, Any]:
    """Output row with unscreened questions, for rows without an image or usable questions."""
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
