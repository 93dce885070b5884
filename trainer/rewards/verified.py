"""Reward for true sentences: each sentence of a caption is checked against the image by a vision-language model.

The penalty is a sum over sentences: by their mean, a caption of one safe sentence would be the best. A sum alone is the
best for no sentence at all, so captions with few sentences pay for those that they lack (a length-conditional mask, as
BalCapRL, arXiv 2605.07394, has for its linguistic reward, but without its cliff). A long sentence counts as several:
else one false sentence would be cheaper than the same claims in three.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field

from ...models.context_check import statement_tokens
from ...models.engines.base import Completion, Engine, EngineDead, ImageInput, batches
from ...models.engines.context import image_tokens, quiz_room
from ...models.engines.loading import EngineConfig, load_engine
from ...models.engines.thinking import thinks
from ...models.lru_cache import LRUCache
from ...models.quiz import fold
from ...models.reader import THOUGHT_TOKENS, QuizReader, ReaderConfig
from ...models.scorers.sentences import sentence_spans
from ...models.yes_no import YesNo, YesNoConfig, YesNoReader
from ...stages.filter.ngrams import words_of
from ..dataset import Example
from ..images import Pictures
from .base import RewardConfig, RewardContext, RewardSpec, Scored
from .token_penalties import Decode, tokens_at

KEPT = 65_536  # answers in the cache, by image and sentence: those of a step's captions, many times over


class VerifiedRewardConfig(RewardConfig):
    """A caption earns minus the sum of its sentences' penalties, and minus what it lacks: at most 0."""

    kind: Literal["verified"] = "verified"
    model: str = Field(description="who checks: a bundled model that sees, a folder, a hub id")
    engine: str = Field("auto", description="auto, vllm, transformers or URLs of servers, separated by commas")
    mode: Literal["choose", "sampled"] = Field(
        "choose",
        description="choose: the probability of yes by the letters' log-probabilities; sampled: its share of sampled "
        "answers, for servers without log-probabilities",
    )
    orders: int = Field(2, ge=1, le=2, description="orders of yes and no in which a sentence is put; 2 cancel a bias")
    samples: int = Field(8, ge=1, description="sampled: answers in each order")
    penalty: Literal["hinge", "step", "linear"] = Field(
        "hinge",
        description="of a sentence that is true with probability p; hinge: 1 - p / threshold, at least 0; step: 1 "
        "below the threshold; linear: 1 - p",
    )
    threshold: float = Field(0.5, gt=0, le=1, description="probability below which a sentence counts as wrong")
    words: int = Field(
        20, ge=1, description="longest sentence that counts once; longer ones count words / this, as several would"
    )
    least: float = Field(
        3.0, ge=0, description="sentences that a caption should have; different ones count, long ones as above"
    )
    missing: float = Field(
        0.5, ge=0, le=1, description="cost of each that it lacks, between a true sentence's, 0, and a false one's, 1"
    )
    least_scored: float = Field(0.5, gt=0, le=1, description="share of answers without which a caption is unscored")
    template_args: dict[str, Any] = Field(
        {}, description="given to the model's chat template besides the chat, e.g. {enable_thinking: false}"
    )
    thought_tokens: int = Field(
        THOUGHT_TOKENS, ge=1, description="longest thought of a model that thinks before each answer"
    )
    weight: float = Field(1.0, description="what a false sentence costs")
    normalise: Literal[False] = False  # a share of a group's spread has no place among tokens

    @property
    def asks(self) -> YesNoConfig:
        """How a sentence is put."""
        return YesNoConfig(mode=self.mode, orders=self.orders, samples=self.samples, thought_tokens=self.thought_tokens)


class VerifiedReward:
    """Minus the penalties of a caption's sentences, each charged to the token that ends it, and of those it lacks.

    A sentence is asked about once for an image, whatever captions have it. On a CPU an engine that batches what waits
    together gets one sentence at a time: which captions wait depends on timing, the last digits of probabilities on the
    batch, and the weights of a run that is repeated on both.
    """

    metrics = ("sentences", "wrong", "lacking")

    def __init__(self, engine: Engine, config: VerifiedRewardConfig, decode: Decode) -> None:
        self.reader, self.config = YesNoReader(engine, config.asks), config
        self._decode = decode
        self._pictures = Pictures(engine.grid)
        self._asked: LRUCache[tuple[str, str], asyncio.Task[YesNo]] = LRUCache(KEPT)
        alone = batches(engine) and config.mode == "choose" and not torch.cuda.is_available()
        self._turn: AbstractAsyncContextManager[object] = asyncio.Lock() if alone else nullcontext()

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        config, spans = self.config, sentence_spans(caption.text)
        sentences = [caption.text[start:end] for start, end in spans]
        image = await self._pictures.of(example)
        answers = await self._answers(image, sentences)
        probabilities = [answer.probability for answer in answers]
        known = [value for value in probabilities if value is not None]
        lacking = lacking_sentences(sentences, config)
        details: dict[str, Any] = {
            "sentences": len(sentences),
            "wrong": sum(value < config.threshold for value in known),
            "lacking": lacking,
            "probabilities": [None if value is None else round(value, 4) for value in probabilities],
        }
        if len(known) < config.least_scored * len(sentences):
            reason = next(answer.error or answer.instead for answer in answers if answer.probability is None)
            return Scored(None, {**details, "error": reason})
        costs = penalties(sentences, probabilities, config)
        value = -sum(costs) - config.missing * lacking
        return Scored(value, details, self._charged(caption, [end for _, end in spans], costs))

    async def _answers(self, image: ImageInput, sentences: Sequence[str]) -> list[YesNo]:
        """Raises EngineDead, after all requests of the caption have ended."""
        outcomes = await asyncio.gather(*(self._one(image, text) for text in sentences), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]

    async def _one(self, image: ImageInput, sentence: str) -> YesNo:
        key = image.uid, sentence
        asking = self._asked.get(key)
        if asking is None:
            asking = asyncio.create_task(self._check(image, sentence))
            self._asked.put(key, asking)
        try:
            answer = await asyncio.shield(asking)
        except EngineDead:
            self._asked.drop(key)
            raise
        if answer.error:  # the next caption asks again
            self._asked.drop(key)
        return answer

    async def _check(self, image: ImageInput, sentence: str) -> YesNo:
        async with self._turn:
            (answer,) = await self.reader.check(image, [sentence])
        return answer

    def _charged(self, caption: Completion, ends: Sequence[int], costs: Sequence[float]) -> tuple[float, ...]:
        """Part of the value at each token; empty if the engine reports no token ids (some servers)."""
        if not caption.token_ids:
            return ()
        row = [0.0] * len(caption.token_ids)
        charged = [(end, cost) for end, cost in zip(ends, costs, strict=True) if cost]
        places = tokens_at(caption, [end for end, _ in charged], self._decode)
        for place, (_, cost) in zip(places, charged, strict=True):
            row[place] -= cost
        return tuple(row)

    async def room(self) -> int | None:
        """Tokens left for a sentence beside the largest image and the answer; None if a server hides its context."""
        engine, config = self.reader.engine, self.reader.config
        if engine.context is None:
            return None
        answer = config.max_tokens if config.mode == "sampled" else 1
        if await thinks(engine):
            answer = config.answer_tokens
        return engine.context - await statement_tokens(engine, "") - image_tokens(engine.grid) - answer

    async def aclose(self) -> None:
        self._pictures.close()
        await self.reader.engine.aclose()


def penalty(probability: float, config: VerifiedRewardConfig) -> float:
    """Penalty of a sentence of usual length, from 0 to 1."""
    if config.penalty == "linear":
        return 1.0 - probability
    if config.penalty == "step":
        return float(probability < config.threshold)
    return max(0.0, 1.0 - probability / config.threshold)


def size_of(sentence: str, words: int) -> float:
    """How many sentences one counts as: 1 up to ``words`` words, then in proportion to them."""
    return max(1.0, len(words_of(sentence)) / words)


def penalties(
    sentences: Sequence[str], probabilities: Sequence[float | None], config: VerifiedRewardConfig
) -> list[float]:
    """Penalty of each sentence; 0 without an answer. A sentence that comes again costs again."""
    return [
        0.0 if value is None else penalty(value, config) * size_of(sentence, config.words)
        for sentence, value in zip(sentences, probabilities, strict=True)
    ]


def lacking_sentences(sentences: Sequence[str], config: VerifiedRewardConfig) -> float:
    """How many sentences a caption lacks; one that comes again counts once."""
    different = {fold(sentence): size_of(sentence, config.words) for sentence in sentences}
    return max(0.0, config.least - sum(different.values()))


async def build_verified_reward(config: VerifiedRewardConfig, context: RewardContext) -> VerifiedReward:
    """The reward with its engine started. Raises BadInput for a missing model, or a server that cannot be asked so."""
    longest = context.caption_tokens
    room = None if longest is None else quiz_room(longest, config.asks.answer_tokens)
    engine = await load_engine(EngineConfig(config.engine, config.model, room=room, template_args=config.template_args))
    try:
        if "://" in config.engine:
            await QuizReader(engine, ReaderConfig(mode=config.mode, thought_tokens=config.thought_tokens)).check()
        return VerifiedReward(engine, config, context.decode)
    except BaseException:
        await engine.aclose()
        raise


SPEC = RewardSpec(VerifiedRewardConfig, build_verified_reward, of_image=True)
