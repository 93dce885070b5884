"""Quiz reward: accuracy of a text-only reader on an image's questions, from the caption alone."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, Literal

from pydantic import Field

from ...models.engines.base import Completion, Engine
from ...models.engines.context import quiz_room
from ...models.engines.loading import EngineConfig, load_engine
from ...models.quiz import PromptStyle, Question
from ...models.reader import THOUGHT_TOKENS, Order, QuizReader, ReaderConfig
from ..dataset import Example
from .base import RewardConfig, RewardContext, RewardSpec, Scored


class QuizRewardConfig(RewardConfig):
    """``sampled``: as CapRL (arXiv 2509.22647 eq. 1-3); ``rotated``: every question in every cyclic order."""

    later = ("template_args", "thought_tokens", "mode", "reader_prompt", "absent")

    kind: Literal["quiz"] = "quiz"
    reader: str = Field("tiny/reader", description="who answers: a bundled model, a folder, a hub id")
    engine: str = Field("auto", description="auto, vllm, transformers or URLs of servers, separated by commas")
    mode: Literal["choose", "sampled"] = Field(
        "choose",
        description="choose: the likeliest letter; sampled: letters read from generated text, for servers without "
        "log-probabilities",
    )
    presentations: Literal["rotated", "sampled"] = Field(
        "rotated",
        description="rotated: every question in every cyclic order; sampled: with replacement, shuffled",
    )
    questions: int | None = Field(None, ge=1, description="how many are put for a caption; all by default")
    least_scored: float = Field(0.5, gt=0, le=1, description="share of answers without which a caption is unscored")
    template_args: dict[str, Any] = Field(
        {}, description="given to the reader's chat template besides the chat, e.g. {enable_thinking: false}"
    )
    thought_tokens: int = Field(
        THOUGHT_TOKENS, ge=1, description="longest thought of a reader that thinks before each answer"
    )
    reader_prompt: PromptStyle = Field(
        "own",
        description="caprl: two worked examples, the answer begun, the option to abstain last and not shuffled",
    )
    absent: Literal["unsaid", "answered"] = Field(
        "unsaid",
        description="questions about things that are not in the image (kind absent); unsaid: right unless the caption "
        "says that the thing is there, so no answer is right, too; answered: right if the reader says no",
    )


class QuizReward:
    """Mean accuracy over the presentations that could be scored."""

    def __init__(self, reader: QuizReader, config: QuizRewardConfig) -> None:
        self.reader, self.config = reader, config

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        return await self.score_text(example, caption.text, sample_id)

    async def score_text(self, example: Example, caption: str | None, sample_id: str) -> Scored:
        """Like :meth:`score`, for a text, or None for no caption (blind)."""
        asked = self.presentations(example, sample_id)
        answers = await self.reader.answer(caption, asked)
        known = [
            (question, answer) for (question, _), answer in zip(asked, answers, strict=True) if isinstance(answer, int)
        ]
        details = {
            "asked": [question.id for question, _ in asked],
            "chosen": [answer if isinstance(answer, int) else None for answer in answers],
        }
        errors = [answer for answer in answers if isinstance(answer, str)]
        if errors:
            details["errors"] = errors[:1]
        if len(known) < self.config.least_scored * len(asked):
            return Scored(None, details)
        right = sum(is_right(question, answer, self.config.absent) for question, answer in known)
        return Scored(right / len(known), details)

    def presentations(self, example: Example, sample_id: str) -> list[tuple[Question, Order]]:
        """Questions for a caption, each with an order of its options."""
        rng = Random(f"quiz:{sample_id}")
        count = self.config.questions
        if self.config.presentations == "sampled":
            questions = [rng.choice(example.questions) for _ in range(count or len(example.questions))]
            return [(item, self.reader.shuffled(item, rng)) for item in questions]
        chosen = (
            example.questions if count is None else rng.sample(example.questions, min(count, len(example.questions)))
        )
        return [(question, order) for question in chosen for order in self.reader.orders(question)]

    async def aclose(self) -> None:
        await self.reader.engine.aclose()


def is_right(question: Question, choice: int, absent: Literal["unsaid", "answered"]) -> bool:
    """Whether a choice speaks for the caption; ``len(question.options)`` is to abstain. ``absent``: see the config."""
    return choice == question.answer or (
        absent == "unsaid" and question.asks_absent and choice == len(question.options)
    )


def reader_config(config: QuizRewardConfig) -> ReaderConfig:
    """Reader settings of the reward; options in all orders."""
    return ReaderConfig(mode=config.mode, thought_tokens=config.thought_tokens, prompt=config.reader_prompt)


async def load_reader(
    model: str,
    engine: str,
    caption_tokens: int | None = None,
    config: ReaderConfig | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Engine:
    """Engine of a reader for captions up to ``caption_tokens``, which answers questions according to ``config``."""
    room = None if caption_tokens is None else quiz_room(caption_tokens, (config or ReaderConfig()).answer_tokens)
    return await load_engine(EngineConfig(engine, model, room=room, template_args=template_args or {}))


async def build_quiz_reward(config: QuizRewardConfig, context: RewardContext) -> QuizReward:
    """The reward with its reader started. Raises BadInput if the model at a URL cannot be a reader."""
    asks = reader_config(config)
    engine = await load_reader(config.reader, config.engine, context.caption_tokens, asks, config.template_args)
    reader = QuizReader(engine, asks)
    try:
        if "://" in config.engine:
            await reader.check()
    except BaseException:
        await engine.aclose()
        raise
    return QuizReward(reader, config)


SPEC = RewardSpec(QuizRewardConfig, build_quiz_reward)
