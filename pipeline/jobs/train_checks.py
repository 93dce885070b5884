"""Checks before training: the validation reader differs from the reward's, and captions fit their readers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...errors import BadInput
from ...models.context_check import LONGEST, check_asked, room, statement_tokens, telling, tokens_for
from ...models.engines.loading import ModelIdentity, model_identity, same_model
from ...models.quiz import Question, self_oracle
from ...models.reader import QuizReader
from ...trainer.dataset import Example, ExampleList
from ...trainer.preflight import GENERIC
from ...trainer.recipe import Recipe
from ...trainer.rewards.base import RewardManager
from ...trainer.rewards.quiz import QuizReward, QuizRewardConfig
from ...trainer.rewards.verified import VerifiedReward

if TYPE_CHECKING:
    from ...models.engines.prompting import PromptEncoder


def reward_reader(recipe: Recipe) -> ModelIdentity | None:
    """The reader of the quiz reward, None without one. Raises BadInput if validation uses the same model."""
    quiz = next((reward for reward in recipe.rewards if isinstance(reward, QuizRewardConfig)), None)
    if quiz is None:
        return None
    reader = model_identity(quiz.reader, quiz.engine)
    if recipe.validation is None:
        return reader
    other = model_identity(recipe.validation.reader, recipe.validation.engine)
    if same_model(reader, other):
        raise BadInput(
            f"validation.reader: {other.name} is the reward's reader, {reader.name}, under another name; take a model "
            "that was never a reward"
        )
    return reader


async def check_fits(
    recipe: Recipe,
    rewards: RewardManager,
    grader: QuizReader | None,
    training: ExampleList,
    held_out: ExampleList | None,
    encoder: PromptEncoder,
) -> None:
    """Raise BadInput if a reader cannot answer the questions, or not with the policy's longest caption.

    Likewise for a model that checks sentences, of which a caption may be a single one. A caption that is too long for
    its reader would have no score: its length could never be penalized.
    """
    reward = rewards.rewards.get("quiz")
    if isinstance(reward, QuizReward):
        await _fits(recipe, reward.reader, reward.config.reader, training.examples, encoder)
    if isinstance(checking := rewards.rewards.get("verified"), VerifiedReward):
        await _fits_statements(recipe, checking, encoder)
    if grader is not None and recipe.validation is not None and held_out is not None:
        await _fits(recipe, grader, recipe.validation.reader, held_out.examples, encoder)


async def _fits(
    recipe: Recipe, reader: QuizReader, name: str, examples: tuple[Example, ...], encoder: PromptEncoder
) -> None:
    most = recipe.rollout.max_tokens
    asked = telling(question for example in examples for question in example.questions)
    await check_asked(reader, name, asked)
    left = await room(reader, asked)
    if left is None:
        await _try(reader, name, most, asked[0])
        return
    texts = [self_oracle(example.questions) for example in examples[:LONGEST]]
    needed = await tokens_for(reader, most, texts, lambda text: len(encoder.text_ids(text)), asked[0])
    if needed > left:
        raise BadInput(
            f"rollout.max_tokens: a caption of {most} tokens may be {needed} tokens to {name}, which has room for "
            f"{max(left, 0)} beside the longest question (its context is {reader.engine.context}); lower it, or take a "
            "reader with a longer context"
        )


async def _try(reader: QuizReader, name: str, most: int, question: Question) -> None:
    """Test a server that does not report its context with a caption of ``most`` one-token words. Raises BadInput."""
    order = tuple(range(len(question.options) + 1))
    (answer,) = await reader.answer(" ".join(["a"] * most), [(question, order)])
    if isinstance(answer, str):
        raise BadInput(
            f"rollout.max_tokens: {name} did not take a caption of {most} tokens ({answer}); lower it, or take a "
            "reader with a longer context"
        )


async def _fits_statements(recipe: Recipe, reward: VerifiedReward, encoder: PromptEncoder) -> None:
    left, most = await reward.room(), recipe.rollout.max_tokens
    if left is None:  # a server that hides its context reports what does not fit caption by caption
        return
    engine = reward.reader.engine
    theirs = await statement_tokens(engine, GENERIC) - await statement_tokens(engine, "")
    needed = math.ceil(most * max(1.0, theirs / len(encoder.text_ids(GENERIC))))
    if needed > left:
        raise BadInput(
            f"rollout.max_tokens: a caption of {most} tokens, if it is a single sentence, may be {needed} tokens to "
            f"{reward.config.model}, which has room for {max(left, 0)} beside the image (its context is "
            f"{engine.context}); lower it, or check sentences by a model with a longer context"
        )
