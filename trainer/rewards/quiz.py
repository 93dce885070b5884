"""The quiz as reward: how well a text-only reader answers an image's questions from the caption alone."""

from __future__ import annotations

from random import Random
from typing import Any, Literal

from pydantic import ConfigDict, Field

from ...manifests.configuration import Growing
from ...models.engines.base import Completion
from ...models.quiz import Question
from ...models.reader import THOUGHT_TOKENS, Order, QuizReader, ReaderConfig
from ..dataset import Example
from .base import Scored


class QuizRewardConfig(Growing):
    """``sampled``: as CapRL (arXiv 2509.22647 eq. 1-3); ``rotated``: every question in every cyclic order."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later = ("template_args", "thought_tokens", "mode")

    kind: Literal["quiz"] = "quiz"
    reader: str = Field("tiny/reader", description="who answers: a bundled model, a folder, a hub id")
    engine: str = Field("auto", description="auto, vllm, transformers or URLs of servers, separated by commas")
    mode: Literal["choose", "sampled"] = Field(
        "choose", description="choose: the likeliest letter; sampled: drawn ones, for servers without log-probabilities"
    )
    presentations: Literal["rotated", "sampled"] = Field(
        "rotated",
        description="rotated: every question in every cyclic order; sampled: drawn with replacement, shuffled",
    )
    questions: int | None = Field(None, ge=1, description="how many are put for a caption; all by default")
    least_scored: float = Field(0.5, gt=0, le=1, description="share of answers without which a caption is unscored")
    weight: float = 1.0
    normalise: bool = False
    template_args: dict[str, Any] = Field(
        {}, description="given to the reader's chat template besides the chat, e.g. {enable_thinking: false}"
    )
    thought_tokens: int = Field(
        THOUGHT_TOKENS, ge=1, description="longest thought of a reader that thinks before each answer"
    )


class QuizReward:
    """Mean accuracy over the presentations that could be scored."""

    def __init__(self, reader: QuizReader, config: QuizRewardConfig) -> None:
        self.reader, self.config = reader, config

    async def score(self, task: Example, caption: Completion, draw: str) -> Scored:
        return await self.score_text(task, caption.text, draw)

    async def score_text(self, task: Example, caption: str | None, draw: str) -> Scored:
        """The same for a text, or for none at all (blind)."""
        put = self.presentations(task, draw)
        answers = await self.reader.answer(caption, put)
        known = [
            (question, answer) for (question, _), answer in zip(put, answers, strict=True) if isinstance(answer, int)
        ]
        details = {
            "asked": [question.id for question, _ in put],
            "chosen": [answer if isinstance(answer, int) else None for answer in answers],
        }
        errors = [answer for answer in answers if isinstance(answer, str)]
        if errors:
            details["errors"] = errors[:1]
        if len(known) < self.config.least_scored * len(put):
            return Scored(None, details)
        return Scored(sum(answer == question.answer for question, answer in known) / len(known), details)

    def presentations(self, task: Example, draw: str) -> list[tuple[Question, Order]]:
        """Which questions are put in which orders for the caption that ``draw`` names."""
        rng = Random(f"quiz:{draw}")
        count = self.config.questions
        if self.config.presentations == "sampled":
            drawn = [rng.choice(task.questions) for _ in range(count or len(task.questions))]
            return [(each, tuple(rng.sample(range(len(each.options) + 1), len(each.options) + 1))) for each in drawn]
        chosen = task.questions if count is None else rng.sample(task.questions, min(count, len(task.questions)))
        return [(each, order) for each in chosen for order in self.reader.orders(each)]

    async def aclose(self) -> None:
        await self.reader.engine.aclose()


def reader_config(config: QuizRewardConfig) -> ReaderConfig:
    """How the reward's reader is asked: in all orders."""
    return ReaderConfig(mode=config.mode, thought_tokens=config.thought_tokens)
