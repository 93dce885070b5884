"""The quiz reader: puts multiple-choice questions to a model about a caption, an image, or nothing at all.

One reader serves screening, the reward and evaluation. All questions about a caption (or an image) in all their orders
share its prompt's beginning, which engines compute once; what could not be scored is None, never a wrong answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pydantic import ConfigDict, Field

from ..errors import BadInput
from ..manifests.configuration import Growing
from .engines.base import (
    ChoiceRequest,
    ChoiceScores,
    Engine,
    GenerationRequest,
    ImageInput,
    Prompt,
    Refused,
    RequestError,
    Sampling,
    Thought,
)
from .engines.thinking import after_thought, thinks
from .quiz import ABSTAIN, Question, caption_prompt, image_prompt, letters, parse_letter, put, rotations, shuffles

Order = tuple[int, ...]
Place = int | None  # of a letter
Answer = int | str | None  # a choice, why its request failed, or None where the reader named no option
THOUGHT_TOKENS, THOUGHT_TEMPERATURE = 512, 0.6
LONGEST_INSTEAD = 80  # characters of an answer that names no option
TOLD_AT = frozenset(10**power for power in range(9))  # cut thoughts, unread answers at which the count is logged

logger = logging.getLogger(__name__)


class ReaderConfig(Growing):
    """How questions are put and answers taken. All of it changes outcomes, so all of it is in fingerprints."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later = ("thought_tokens", "thought_temperature")

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
    thought_tokens: int = Field(
        THOUGHT_TOKENS,
        ge=1,
        description="of a model that thinks first: longest thought; a longer one is closed there",
    )
    thought_temperature: float = Field(
        THOUGHT_TEMPERATURE, ge=0, description="choose: of that thought; greedy ones tend to go in circles"
    )

    @property
    def answer_tokens(self) -> int:
        """Tokens of the longest answer with the thought before it."""
        return self.max_tokens + self.thought_tokens


@dataclass(frozen=True)
class Reading:
    """What became of one question: the choice of each presentation, None where there is none.

    A choice is an option's index; ``len(question.options)`` is to abstain. ``errors``: of requests that failed, to be
    made again; a None without one is a reader's answer that names no option, which would not change: ``instead`` is the
    first of these, and ``refused`` how many of them are refusals. ``cut``: presentations before whose answer a thought
    was cut at its limit.
    """

    question: Question
    chosen: tuple[int | None, ...]
    errors: tuple[str, ...] = ()
    cut: int = 0
    instead: str = ""
    refused: int = 0

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


class _Reply(NamedTuple):
    answer: Answer
    cut: bool = False  # a thought before it was, at its limit
    instead: str = ""  # what came where the answer is None
    refused: bool = False


class _Placed(NamedTuple):
    place: Place
    thought: Thought | None
    instead: str


class QuizReader:
    """Asks through an engine. Raises EngineDead alone; a request that fails is a None with its reason.

    A model that thinks first is let think, and its answer is taken after the thought. ``thoughts``, ``cut``: how many
    there were, and how many of them came to their limit and were closed there.
    """

    def __init__(self, engine: Engine, config: ReaderConfig) -> None:
        self.engine, self.config = engine, config
        self.thoughts = self.cut = 0
        self._reads, self._unread = False, 0  # whether any answer named an option; how many did not before

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
        told = await self._answers(caption_prompt(caption, self.config.abstain), None, asked)
        return [each.answer for each in told]

    async def _answers(
        self, beginning: str, image: ImageInput | None, asked: Sequence[tuple[Question, Order]]
    ) -> list[_Reply]:
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
        told = iter(await self._answers(beginning, image, asked))
        readings = []
        for question, its_orders in zip(questions, orders, strict=True):
            mine = [next(told) for _ in its_orders]
            chosen = tuple(None if isinstance(each.answer, str) else each.answer for each in mine)
            errors = tuple(each.answer for each in mine if isinstance(each.answer, str))
            instead = next((each.instead for each in mine if each.instead), "")
            cut, refused = sum(each.cut for each in mine), sum(each.refused for each in mine)
            readings.append(Reading(question, chosen, errors, cut, instead, refused))
        return readings

    async def _answer(self, prompt: Prompt, question: Question, order: Order, number: int) -> _Reply:
        """The choice of one presentation, None where the reader made none, or why its request failed."""
        seed = seed_of(f"{self.config.seed}/{question.id}/{number}/{prompt.text}")
        try:
            place, thought, instead = await self._place(prompt, len(order), seed)
        except Refused as error:
            self._count_read(None, str(error))
            return _Reply(None, instead=str(error), refused=True)
        except RequestError as error:
            return _Reply(str(error))
        self._count(thought)
        self._count_read(place, instead)
        cut = thought is not None and not thought.closed
        return _Reply(None, cut, instead) if place is None else _Reply(order[place], cut)

    async def check(self) -> None:
        """Put one question to a reader behind a server. Raises BadInput where it says that it can never answer any.

        What may be better in a moment is not held against it.
        """
        question = Question("Is one and one two?", ("Yes", "No"), 0)
        text = caption_prompt(None, self.config.abstain) + put(question, (0, 1, 2), self.config.abstain)
        try:
            await self._place(Prompt(text), 3, self.config.seed)
        except RequestError as error:
            if error.final:
                raise BadInput(f"the reader cannot answer: {error}") from error

    async def _place(self, prompt: Prompt, choices: int, seed: int) -> _Placed:
        answered = self._chosen if self.config.mode == "choose" else self._sampled
        return await answered(prompt, choices, seed, await thinks(self.engine))

    async def _chosen(self, prompt: Prompt, choices: int, seed: int, thinking: bool) -> _Placed:
        """The place of the likeliest letter where the model's answer begins, and the thought before it."""
        config, thought = self.config, None
        if thinking:
            sampling = Sampling(config.thought_temperature, 1.0, config.thought_tokens, seed)
            prompt, thought = await after_thought(self.engine, prompt, sampling)
        scores = await self.engine.choose(ChoiceRequest(prompt, letters(choices)))
        return _Placed(best_place(scores, config.least_mass), thought, instead_of_letters(scores))

    async def _sampled(self, prompt: Prompt, choices: int, seed: int, thinking: bool) -> _Placed:
        """The place of the letter that a drawn answer names, and the thought before it."""
        config = self.config
        sampling = Sampling(config.temperature, 1.0, config.max_tokens, seed)
        room = replace(sampling, max_tokens=config.thought_tokens + config.max_tokens) if thinking else sampling
        answer = await self.engine.generate(GenerationRequest(prompt, room))
        thought = answer.thought
        if thought is not None and not answer.text:  # cut before the answer
            closed = replace(prompt, thought=thought.text)
            answer = await self.engine.generate(GenerationRequest(closed, sampling))
        return _Placed(parse_letter(answer.text, choices), thought, repr(answer.text.strip()[:LONGEST_INSTEAD]))

    def _count_read(self, place: Place, instead: str) -> None:
        """Say it where no answer at all names an option: a few may be the model's, all of them are a wrong setting."""
        self._reads |= place is not None
        if self._reads:
            return
        self._unread += 1
        if self._unread > 1 and self._unread in TOLD_AT:
            logger.warning("none of the reader's %d answers names an option; it says %s", self._unread, instead)

    def _count(self, thought: Thought | None) -> None:
        if thought is None:
            return
        self.thoughts += 1
        if self.thoughts == 1:
            logger.warning(
                "the reader thinks before each answer, for up to %d tokens; where its chat template can be told not to "
                "(Qwen3's by enable_thinking=false), answers cost one token",
                self.config.thought_tokens,
            )
        self.cut += not thought.closed
        if not thought.closed and self.cut in TOLD_AT:
            logger.warning("%d of %d thoughts of the reader were cut at their limit", self.cut, self.thoughts)


def best_place(scores: ChoiceScores, least_mass: float) -> int | None:
    """The likeliest letter's place; None where scores are no numbers or all letters together are hardly ever meant."""
    known = [score for score in scores.logprobs if score is not None]
    if any(math.isnan(score) for score in known) or all(score == -math.inf for score in known):
        return None
    return scores.best if sum(math.exp(min(score, 0.0)) for score in known) >= least_mass else None


def instead_of_letters(scores: ChoiceScores) -> str:
    """What a model would say where letters are hardly ever meant."""
    known = [score for score in scores.logprobs if score is not None]
    mass = sum(math.exp(min(score, 0.0)) for score in known)
    if math.isnan(mass):
        return "scores that are no numbers"
    likely = f"letters with a probability of {mass:.2g} together" if known else "no letter among the likeliest tokens"
    return f"{scores.first!r} and {likely}" if scores.first else likely


def seed_of(text: str) -> int:
    """A 63-bit seed from a text that identifies a draw."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
