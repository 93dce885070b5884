"""Quiz reader: asks a model multiple-choice questions about a caption, an image, or nothing at all.

One reader serves screening, the reward and evaluation. All questions about a caption (or an image) in all their orders
share a prompt prefix, which engines compute once; what could not be scored is None, never a wrong answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
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
from .quiz import (
    ABSTAIN,
    PromptStyle,
    Question,
    abstains_last,
    answer_prefix,
    caption_prompt,
    image_prompt,
    letters,
    parse_letter,
    put,
    rotations,
    shuffles,
)

Order = tuple[int, ...]
Place = int | None  # index of a letter
Answer = int | str | None  # a choice, the error of a failed request, or None where the reader named no option
THOUGHT_TOKENS, THOUGHT_TEMPERATURE = 512, 0.6
LONGEST_INSTEAD = 80  # characters shown of an answer that names no option
TOLD_AT = frozenset(10**power for power in range(9))  # counts of cut thoughts and unread answers that are logged

logger = logging.getLogger(__name__)


class ReaderConfig(Growing):
    """Settings for asking questions and reading answers. All of them change outcomes, so all are in fingerprints."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later = ("thought_tokens", "thought_temperature", "prompt")

    presentations: int | None = Field(
        None, ge=1, description="orders in which each question is put; all cyclic ones (or 4 shuffled) by default"
    )
    orders: Literal["cyclic", "shuffled"] = Field(
        "cyclic", description="cyclic: over all of them every choice stands in every place once; shuffled: at random"
    )
    mode: Literal["choose", "sampled"] = Field(
        "choose",
        description="choose: the likeliest option letter; sampled: a letter read from generated text",
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

    prompt: PromptStyle = Field("own", description="own, or caprl: with examples, the option to abstain last")

    @property
    def answer_tokens(self) -> int:
        """Tokens of the longest answer with the thought before it."""
        return self.max_tokens + self.thought_tokens


@dataclass(frozen=True)
class Reading:
    """The result of one question: the choice of each presentation, None where there is none.

    A choice is an option's index; ``len(question.options)`` is to abstain. ``errors``: of failed requests, which are to
    be repeated; a None without one is an answer that names no option, which would not change: ``instead`` is the first
    of these, and ``refused`` how many of them are refusals. ``cut``: presentations whose thought was truncated at its
    limit.
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
        """The share of scored presentations answered correctly (CapRL, eq. 3, over presentations); None without any."""
        return self.right / self.scored if self.scored else None


class _Reply(NamedTuple):
    answer: Answer
    cut: bool = False  # the thought before it was truncated at its limit
    instead: str = ""  # the text received where the answer is None
    refused: bool = False


class _Placed(NamedTuple):
    place: Place
    thought: Thought | None
    instead: str


class QuizReader:
    """Asks questions through an engine. Raises EngineDead only; a failed request is a None with its reason.

    A model that thinks first may do so, and its answer is taken after the thought. ``thoughts``: how many there were;
    ``cut``: how many of them were truncated at their limit.
    """

    def __init__(self, engine: Engine, config: ReaderConfig) -> None:
        self.engine, self.config = engine, config
        self.thoughts = self.cut = 0
        self._reads, self._unread = False, 0  # whether any answer named an option; how many did not before that

    async def read(self, caption: str | None, questions: Sequence[Question]) -> list[Reading]:
        """Answers from ``caption`` alone; None asks the questions blind."""
        return await self._ask(self._about(caption), questions)

    async def look(self, image: ImageInput | None, questions: Sequence[Question]) -> list[Reading]:
        """Answers from the image, or to the same prompt without it: both have the same options."""
        return await self._ask(Prompt(image_prompt(self.config.abstain, self.config.prompt), image), questions)

    async def guess(self, questions: Sequence[Question]) -> list[Reading]:
        """Answers to the prompt of :meth:`look` without an image and without the option to abstain."""
        return await self._ask(Prompt(image_prompt(None, self.config.prompt)), questions, abstains=False)

    def orders(self, question: Question, abstains: bool = True) -> list[Order]:
        """The orders in which ``question`` is asked, abstaining among the choices unless ``abstains`` is false."""
        moved, count = self._moved(question, abstains), self.config.presentations
        if self.config.orders == "cyclic":
            orders = rotations(moved, count)
        else:
            orders = shuffles(moved, count or 4, f"{self.config.seed}/{question.id}")
        return [self._whole(order, question) if abstains else order for order in orders]

    def shuffled(self, question: Question, rng: Random) -> Order:
        """A random order of the choices."""
        moved = self._moved(question)
        return self._whole(tuple(rng.sample(range(moved), moved)), question)

    def _moved(self, question: Question, abstains: bool = True) -> int:
        """How many of the choices change places."""
        return len(question.options) + (abstains and not abstains_last(self.config.prompt))

    def _whole(self, order: Order, question: Question) -> Order:
        return order if len(order) > len(question.options) else (*order, len(question.options))

    def _about(self, caption: str | None) -> Prompt:
        """What is asked about a caption (None: blind), without the question."""
        text = caption_prompt(caption, self.config.abstain, self.config.prompt)
        return Prompt(text, answer_prefix=answer_prefix(self.config.prompt))

    async def answer(self, caption: str | None, asked: Sequence[tuple[Question, Order]]) -> list[Answer]:
        """Answers from ``caption`` alone (None: blind) to questions, each in the one order given with it.

        Raises ValueError for an order that is no permutation of its question's choices.
        """
        replies = await self._answers(self._about(caption), asked)
        return [reply.answer for reply in replies]

    async def _answers(
        self, beginning: Prompt, asked: Sequence[tuple[Question, Order]], abstains: bool = True
    ) -> list[_Reply]:
        abstain = self.config.abstain if abstains else None
        prompts = [replace(beginning, text=beginning.text + put(question, order, abstain)) for question, order in asked]
        numbers: Counter[str] = Counter()
        waiting = []
        for (question, order), prompt in zip(asked, prompts, strict=True):
            waiting.append(self._answer(prompt, question, order, numbers[question.id]))
            numbers[question.id] += 1
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)  # concurrently: engines can share prefixes
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]

    async def _ask(self, beginning: Prompt, questions: Sequence[Question], abstains: bool = True) -> list[Reading]:
        orders = [self.orders(question, abstains) for question in questions]
        asked = [
            (question, order) for question, its_orders in zip(questions, orders, strict=True) for order in its_orders
        ]
        replies = iter(await self._answers(beginning, asked, abstains))
        readings = []
        for question, its_orders in zip(questions, orders, strict=True):
            mine = [next(replies) for _ in its_orders]
            chosen = tuple(None if isinstance(reply.answer, str) else reply.answer for reply in mine)
            errors = tuple(reply.answer for reply in mine if isinstance(reply.answer, str))
            instead = next((reply.instead for reply in mine if reply.instead), "")
            cut, refused = sum(reply.cut for reply in mine), sum(reply.refused for reply in mine)
            readings.append(Reading(question, chosen, errors, cut, instead, refused))
        return readings

    async def _answer(self, prompt: Prompt, question: Question, order: Order, number: int) -> _Reply:
        """The choice of one presentation, None where the reader made none, or the error of its failed request."""
        seed = seed_of(f"{self.config.seed}/{question.id}/{number}/{prompt.text}")
        try:
            index, thought, instead = await self._place(prompt, len(order), seed)
        except Refused as error:
            self._count_read(None, str(error))
            return _Reply(None, instead=str(error), refused=True)
        except RequestError as error:
            return _Reply(str(error))
        self._count(thought)
        self._count_read(index, instead)
        cut = thought is not None and not thought.closed
        return _Reply(None, cut, instead) if index is None else _Reply(order[index], cut)

    async def check(self) -> None:
        """Ask a reader behind a server one question. Raises BadInput where the server says that it can answer none.

        Transient errors are ignored.
        """
        question = Question("Is one and one two?", ("Yes", "No"), 0)
        asked = self._about(None)
        text = asked.text + put(question, (0, 1, 2), self.config.abstain)
        try:
            await self._place(replace(asked, text=text), 3, self.config.seed)
        except RequestError as error:
            if error.final:
                raise BadInput(f"the reader cannot answer: {error}") from error

    async def _place(self, prompt: Prompt, choices: int, seed: int) -> _Placed:
        answered = self._chosen if self.config.mode == "choose" else self._sampled
        return await answered(prompt, choices, seed, await thinks(self.engine))

    async def _chosen(self, prompt: Prompt, choices: int, seed: int, thinking: bool) -> _Placed:
        """The position of the most likely letter at the start of the answer, and the thought before it."""
        config, thought = self.config, None
        if thinking:
            sampling = Sampling(config.thought_temperature, 1.0, config.thought_tokens, seed)
            prompt, thought = await self._thought(prompt, sampling)
        scores = await self.engine.choose(ChoiceRequest(prompt, letters(choices)))
        return _Placed(best_place(scores, config.least_mass), thought, instead_of_letters(scores))

    async def _sampled(self, prompt: Prompt, choices: int, seed: int, thinking: bool) -> _Placed:
        """The position of the letter that a sampled answer names, and the thought before it."""
        config = self.config
        sampling = Sampling(config.temperature, 1.0, config.max_tokens, seed)
        if thinking and prompt.answer_prefix:  # it thinks before the answer begins
            prompt, before = await self._thought(prompt, replace(sampling, max_tokens=config.thought_tokens))
            answer = await self.engine.generate(GenerationRequest(prompt, sampling))
            return _Placed(parse_letter(answer.text, choices), before, _shown(answer.text))
        room = replace(sampling, max_tokens=config.thought_tokens + config.max_tokens) if thinking else sampling
        answer = await self.engine.generate(GenerationRequest(prompt, room))
        thought = answer.thought
        if thought is not None and not answer.text:  # truncated before the answer
            closed = replace(prompt, thought=thought.text)
            answer = await self.engine.generate(GenerationRequest(closed, sampling))
        return _Placed(parse_letter(answer.text, choices), thought, _shown(answer.text))

    async def _thought(self, prompt: Prompt, sampling: Sampling) -> tuple[Prompt, Thought | None]:
        """:func:`~.engines.thinking.after_thought`, with the beginning of the answer after the thought."""
        asked, thought = await after_thought(self.engine, replace(prompt, answer_prefix=""), sampling)
        return replace(asked, answer_prefix=prompt.answer_prefix), thought

    def _count_read(self, index: Place, instead: str) -> None:
        """Log where no answer at all names an option: a few may be the model's fault, all of them a wrong setting."""
        self._reads |= index is not None
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


def _shown(answer: str) -> str:
    return repr(answer.strip()[:LONGEST_INSTEAD])


def best_place(scores: ChoiceScores, least_mass: float) -> int | None:
    """The most likely letter's position; None where scores are no numbers or all letters together are too unlikely."""
    known = [score for score in scores.logprobs if score is not None]
    if any(math.isnan(score) for score in known) or all(score == -math.inf for score in known):
        return None
    return scores.best if sum(math.exp(min(score, 0.0)) for score in known) >= least_mass else None


def instead_of_letters(scores: ChoiceScores) -> str:
    """Description of the model's answer where letters are too unlikely."""
    known = [score for score in scores.logprobs if score is not None]
    mass = sum(math.exp(min(score, 0.0)) for score in known)
    if math.isnan(mass):
        return "scores that are no numbers"
    likely = f"letters with a probability of {mass:.2g} together" if known else "no letter among the likeliest tokens"
    return f"{scores.first!r} and {likely}" if scores.first else likely


def seed_of(text: str) -> int:
    """A 63-bit seed from a text that identifies a sample."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
