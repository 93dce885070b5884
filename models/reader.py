"""The quiz reader: puts multiple-choice questions to a model about a caption, an image, or nothing at all.

One reader serves screening, the reward and evaluation. All questions about a caption (or an image) in all their orders
share its prompt's beginning, which engines compute once; what could not be scored is None, never a wrong answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .engine import ChoiceRequest, ChoiceScores, Engine, GenerationRequest, ImageInput, Prompt, RequestError, Sampling
from .quiz import ABSTAIN, Question, caption_prompt, image_prompt, letters, parse_letter, put, rotations, shuffles

Order = tuple[int, ...]
Answer = int | str | None  # a choice, why its request failed, or None where the reader named no option


class ReaderConfig(BaseModel):
    """How questions are put and answers taken. All of it changes outcomes, so all of it is in fingerprints."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    presentations: int | None = Field(
        None, ge=1, description="orders in which each question is put; all cyclic ones (or 4 shuffled) by default"
    )
    orders: Literal["cyclic", "shuffled"] = Field(
        "cyclic", description="cyclic: over all of them every choice stands in every place once; shuffled: at random"
    )
    mode: Literal["choose", "sampled"] = Field(
        "choose", description="choose: the likeliest option letter; sampled: a drawn text, from which a letter is read"
    )
    least_mass: float = Field(
        0.01, ge=0, lt=1, description="choose: letters less likely than this together are no answer at all"
    )
    temperature: float = Field(0.1, ge=0, description="sampled: 0 is greedy")
    max_tokens: int = Field(4, ge=1, description="sampled: longest answer")
    seed: int = Field(0, description="source of shuffled orders and sampled answers, with each question's id")
    abstain: str = Field(ABSTAIN, min_length=1, description="the option that every presentation has besides its own")


@dataclass(frozen=True)
class Reading:
    """What became of one question: the choice of each presentation, None where there is none.

    A choice is an option's index; ``len(question.options)`` is to abstain. ``errors``: of requests that failed, to be
    made again; a None without one is a reader's answer that names no option, which would not change.
    """

    question: Question
    chosen: tuple[int | None, ...]
    errors: tuple[str, ...] = ()

    @property
    def scored(self) -> int:
        return sum(choice is not None for choice in self.chosen)

    @property
    def right(self) -> int:
        return sum(choice == self.question.answer for choice in self.chosen)

    @property
    def abstained(self) -> int:
        return sum(choice == len(self.question.options) for choice in self.chosen)

    @property
    def accuracy(self) -> float | None:
        """The share of scored presentations answered right (CapRL, eq. 3, over presentations); None without any."""
        return self.right / self.scored if self.scored else None


class QuizReader:
    """Asks through an engine. Raises EngineDead alone; a request that fails is a None with its reason."""

    def __init__(self, engine: Engine, config: ReaderConfig) -> None:
        self.engine, self.config = engine, config

    async def read(self, caption: str | None, questions: Sequence[Question]) -> list[Reading]:
        """Answers from ``caption`` alone; None puts the questions blind."""
        return await self._ask(caption_prompt(caption, self.config.abstain), None, questions)

    async def look(self, image: ImageInput | None, questions: Sequence[Question]) -> list[Reading]:
        """Answers from the image, or by the same words without it: both arms have the same options."""
        return await self._ask(image_prompt(self.config.abstain), image, questions)

    def orders(self, question: Question) -> list[Order]:
        """The orders in which ``question`` is put, abstaining among the choices."""
        choices, count = len(question.options) + 1, self.config.presentations
        if self.config.orders == "cyclic":
            return rotations(choices, count)
        return shuffles(choices, count or 4, f"{self.config.seed}/{question.id}")

    async def answer(self, caption: str | None, asked: Sequence[tuple[Question, Order]]) -> list[Answer]:
        """Answers from ``caption`` alone (None: blind) to questions, each in the one order that is given with it.

        Raises ValueError for an order that does not have every choice of its question once.
        """
        return await self._answers(caption_prompt(caption, self.config.abstain), None, asked)

    async def _answers(
        self, beginning: str, image: ImageInput | None, asked: Sequence[tuple[Question, Order]]
    ) -> list[Answer]:
        prompts = [Prompt(beginning + put(question, order, self.config.abstain), image) for question, order in asked]
        numbers: Counter[str] = Counter()
        waiting = []
        for (question, order), prompt in zip(asked, prompts, strict=True):
            waiting.append(self._answer(prompt, question, order, numbers[question.id]))
            numbers[question.id] += 1
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)  # at once: engines see what they can share
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]

    async def _ask(self, beginning: str, image: ImageInput | None, questions: Sequence[Question]) -> list[Reading]:
        orders = [self.orders(question) for question in questions]
        asked = [
            (question, order) for question, its_orders in zip(questions, orders, strict=True) for order in its_orders
        ]
        answers = iter(await self._answers(beginning, image, asked))
        readings = []
        for question, its_orders in zip(questions, orders, strict=True):
            mine = [next(answers) for _ in its_orders]
            chosen = tuple(None if isinstance(answer, str) else answer for answer in mine)
            readings.append(Reading(question, chosen, tuple(answer for answer in mine if isinstance(answer, str))))
        return readings

    async def _answer(self, prompt: Prompt, question: Question, order: Order, number: int) -> Answer:
        """The choice of one presentation, None where the reader made none, or why its request failed."""
        try:
            if self.config.mode == "choose":
                request = ChoiceRequest(prompt, letters(len(order)))
                place = best_place(await self.engine.choose(request), self.config.least_mass)
            else:
                seed = _seed(f"{self.config.seed}/{question.id}/{number}/{prompt.text}")
                sampling = Sampling(self.config.temperature, 1.0, self.config.max_tokens, seed)
                place = parse_letter((await self.engine.generate(GenerationRequest(prompt, sampling))).text, len(order))
        except RequestError as error:
            return str(error)
        return None if place is None else order[place]


def best_place(scores: ChoiceScores, least_mass: float) -> int | None:
    """The likeliest letter's place; None where scores are no numbers or all letters together are hardly ever meant."""
    known = [score for score in scores.logprobs if score is not None]
    if any(math.isnan(score) for score in known) or all(score == -math.inf for score in known):
        return None
    return scores.best if sum(math.exp(min(score, 0.0)) for score in known) >= least_mass else None


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
