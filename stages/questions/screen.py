"""Question screening: keep questions that a model answers with the image and not without, in every option order.

There are three arms: with the image; without it, where the reader may abstain as it may with the image, so that neither
is easier; and without it, where it has to guess. A reader that abstains whenever it is not sure gives away no leak in
the second, and a guess may be right by luck in the third, so the third allows for chance.

CapRL keeps 4 of 4 with the image and 0 of 4 without (arXiv 2509.22647 App. C; the released 0.75 and 0.25 with strict
comparisons); its only arm without the image has no option to abstain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from ...manifests.configuration import Growing
from ...manifests.shards import Row
from ...manifests.status import QuestionStatus, Status
from ...models.engines.base import ImageInput
from ...models.engines.context import quiz_room
from ...models.quiz import Question
from ...models.reader import QuizReader, ReaderConfig, Reading

QUESTIONS = "questions"  # name of the companion artifact
#: Columns that screening adds to a question: choices of each presentation, and shares of right ones, by arm.
OUTCOMES = ("with_image", "without_image", "image_accuracy", "text_accuracy", "guessed", "guess_accuracy")


class ScreenConfig(Growing):
    """Criteria for keeping a question. All of them affect statuses, so all of them are in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later = ("blind", "guess_margin")

    image_min: float = Field(1.0, ge=0, le=1, description="least share of presentations answered right with the image")
    image_inclusive: bool = Field(True, description="whether that very share is enough")
    text_max: float = Field(0.0, ge=0, le=1, description="largest share answered right without the image")
    text_inclusive: bool = Field(True, description="whether that very share is still allowed")
    reader: ReaderConfig = ReaderConfig()
    blind: Literal["abstain", "guess", "both"] = Field(
        "abstain",
        description="arms without the image: with the option to abstain, without it (a forced guess), or both",
    )
    guess_margin: float | None = Field(
        None, ge=0, le=1, description="share of forced guesses that may be right above chance; text_max itself if none"
    )

    @model_validator(mode="after")
    def _guessed(self) -> ScreenConfig:
        if self.guess_margin is not None and not self.guesses:
            raise ValueError("guess_margin: nothing is guessed with blind: abstain; leave it out")
        return self

    @property
    def abstains(self) -> bool:
        """Whether there is an arm without the image in which the reader may abstain."""
        return self.blind != "guess"

    @property
    def guesses(self) -> bool:
        """Whether there is an arm in which it has to guess."""
        return self.blind != "abstain"

    def leaks(self, share: float) -> bool:
        """True if so many answers are right without the image that the question is refused."""
        return not _above(-share, -self.text_max, self.text_inclusive)

    def guess_leaks(self, share: float, options: int, absent: bool = False) -> bool:
        """The same for forced guesses among so many options.

        ``absent``: the question is whether a thing is there that is not. Whoever has to guess denies what nobody
        mentioned: it may be guessed, only not known.
        """
        if absent:
            return False
        if self.guess_margin is None:
            return self.leaks(share)
        return not _above(-share, -(1 / options + self.guess_margin), True)

    @property
    def room(self) -> int:
        """Context tokens for a question and its answer, without the image."""
        return quiz_room(0, self.reader.answer_tokens)


PRESETS = {
    "strict": ScreenConfig(blind="both", guess_margin=0.25),
    # The released curation: four shuffled presentations, sampled answers of at most four tokens at temperature 0.1;
    # without the image no option to abstain, and with it one.
    "caprl": ScreenConfig(
        image_min=0.75,
        image_inclusive=False,
        text_max=0.25,
        text_inclusive=False,
        blind="guess",
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
        arms = await self._arms(image, questions)
        for index, readings in zip(at, arms, strict=True):
            status, reason = judge(readings, self.config)
            entries[index] |= {"status": str(status), "error": reason} | _outcomes(readings)
        out["screener"] = self.model
        return out | _fate([entries[index] for index in at], [reading for each in arms for reading in each.readings()])

    async def _arms(self, image: ImageInput, questions: Sequence[Question]) -> list[Arms]:
        """All questions in all arms, one arm after the other: engines share the beginning of an arm's prompts."""
        blind: Sequence[Reading | None] = [None] * len(questions)
        guessed = blind
        seen = await self.reader.look(image, questions)
        if self.config.abstains:
            blind = await self.reader.look(None, questions)
        if self.config.guesses:
            guessed = await self.reader.guess(questions)
        return [Arms(*readings) for readings in zip(seen, blind, guessed, strict=True)]


class Arms(NamedTuple):
    """Readings of one question: with the image, without it, by a forced guess; None for an arm that was not asked."""

    with_image: Reading
    without: Reading | None = None
    guess: Reading | None = None

    def readings(self) -> Iterator[Reading]:
        """Those that were asked."""
        return (reading for reading in self if reading is not None)


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


def judge(arms: Arms, config: ScreenConfig) -> tuple[QuestionStatus, str | None]:
    """Status of a question after all arms, with the reason if it is not kept.

    With the image, an answer that names no option may be a correct one in other words: it counts neither way, and if
    the outcome depends on it, the question is unscored. Without the image it is the desired result: no answer.
    """
    errors = [error for reading in arms.readings() for error in reading.errors]
    if errors:
        return QuestionStatus.UNSCORED, errors[0]
    with_image = arms.with_image
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
    return _leak(arms, config) or (QuestionStatus.OK, None)


def _leak(arms: Arms, config: ScreenConfig) -> tuple[QuestionStatus, str] | None:
    """The status with its reason if an arm without the image refuses the question."""
    without, guess = arms.without, arms.guess
    if without is not None and config.leaks(share_right(without)):
        reason = f"right in {without.right} of {len(without.chosen)} presentations without the image"
        return QuestionStatus.LEAKED, reason
    if guess is None:
        return None
    asked, options = guess.question, len(guess.question.options)
    if config.guess_leaks(share_right(guess), options, asked.asks_absent):
        chance = f"chance is 1 in {options}"
        reason = f"right in {guess.right} of {len(guess.chosen)} forced guesses without the image, {chance}"
        return QuestionStatus.LEAKED, reason
    return None


def share_right(reading: Reading) -> float:
    """Fraction of right answers among all presentations, including those that name no option."""
    return reading.right / len(reading.chosen)


def _above(value: float, bound: float, inclusive: bool) -> bool:
    """Comparison with a tolerance for rounding: 2 of 3 presentations equal a bound of 0.6667."""
    return value > bound - 1e-4 if inclusive else value > bound + 1e-4


def _outcomes(arms: Arms) -> dict[str, Any]:
    with_image, without, guess = arms
    unseen = with_image.errors or not with_image.scored
    return {
        "with_image": list(with_image.chosen),
        "without_image": None if without is None else list(without.chosen),
        "image_accuracy": None if unseen else share_right(with_image),
        "text_accuracy": None if without is None or without.errors else share_right(without),
        "guessed": None if guess is None else list(guess.chosen),
        "guess_accuracy": None if guess is None or guess.errors else share_right(guess),
    }


def question_of(entry: dict[str, Any]) -> Question:
    """The question of a stored entry with status ok. Raises ValueError if it is invalid."""
    return Question(entry["question"], tuple(entry["options"]), entry["answer"], entry["kind"])


def passed_on(row: Row) -> dict[str, Any]:
    """Output row with unscreened questions, for rows without an image or usable questions."""
    beside = row.beside.get(QUESTIONS, {})
    fate = beside if row.status is Status.OK and beside else {"status": str(row.status), "error": row.error}
    unscreened = dict.fromkeys(OUTCOMES)
    return {
        "key": row.key,
        "uid": row.uid,
        "status": fate["status"],
        "error": fate["error"],
        "questions": [{**entry, **unscreened} for entry in beside.get("questions") or []],
        "screener": None,
    }
