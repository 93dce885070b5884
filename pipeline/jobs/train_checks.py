"""Before training: is the hold-out reader another model than the reward's, and do captions fit those who read them?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import BadInput
from ...models.context_check import LONGEST, check_asked, room, telling, tokens_for
from ...models.engines.loading import ModelIdentity, model_identity, same_model
from ...models.quiz import Question, self_oracle
from ...models.reader import QuizReader
from ...trainer.dataset import Example, ExampleList
from ...trainer.recipe import Recipe
from ...trainer.rewards.base import RewardManager
from ...trainer.rewards.quiz import QuizReward, QuizRewardConfig

if TYPE_CHECKING:
    from ...models.engines.prompting import PromptEncoder


def reward_reader(recipe: Recipe) -> ModelIdentity | None:
    """Who reads for the quiz, None without one. Raises BadInput where the validation's reader is the same model."""
    quiz = next((each for each in recipe.rewards if isinstance(each, QuizRewardConfig)), None)
    if quiz is None:
        return None
    found = model_identity(quiz.reader, quiz.engine)
    if recipe.validation is None:
        return found
    other = model_identity(recipe.validation.reader, recipe.validation.engine)
    if same_model(found, other):
        raise BadInput(
            f"validation.reader: {other.name} is the reward's reader, {found.name}, under another name; take a model "
            "that was never a reward"
        )
    return found


async def check_fits(
    recipe: Recipe,
    rewards: RewardManager,
    grader: QuizReader | None,
    training: ExampleList,
    held_out: ExampleList | None,
    encoder: PromptEncoder,
) -> None:
    """Raise BadInput where a reader cannot be asked the questions, or not beside the longest caption of the policy.

    A caption that is too long for its reader would have no score: it could never be punished for its length.
    """
    reward = rewards.rewards.get("quiz")
    if isinstance(reward, QuizReward):
        await _fits(recipe, reward.reader, reward.config.reader, training.examples, encoder)
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
    """Ask a server that does not tell its context with a caption of ``most`` words, a token each. Raises BadInput."""
    order = tuple(range(len(question.options) + 1))
    (answer,) = await reader.answer(" ".join(["a"] * most), [(question, order)])
    if isinstance(answer, str):
        raise BadInput(
            f"rollout.max_tokens: {name} did not take a caption of {most} tokens ({answer}); lower it, or take a "
            "reader with a longer context"
        )
