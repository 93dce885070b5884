"""Builds a reward manager, with its models loaded, from a recipe's list of rewards."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from ...errors import BadInput, CapipeError
from ..advantages import RewardTerm
from .base import Reward, RewardConfig, RewardContext, RewardManager
from .kinds import spec_of
from .token_penalties import Decode


async def build_reward_manager(
    configs: Sequence[RewardConfig], decode: Decode, caption_tokens: int | None = None
) -> RewardManager:
    """Build a recipe's rewards and start their engines. ``decode``: token ids to text, with the policy's tokenizer.

    ``caption_tokens``: longest caption, which determines the engines' context length; None: the models' maximum.
    Raises BadInput for a missing model or one of a wrong kind; rewards built before are closed.
    """
    context = RewardContext(decode, caption_tokens)
    rewards: dict[str, Reward] = {}
    try:
        for config in configs:
            rewards[config.kind] = await _build(config, context)
    except BaseException:
        for reward in rewards.values():
            await reward.aclose()
        raise
    return RewardManager(rewards, {config.kind: RewardTerm(config.weight, config.normalise) for config in configs})


async def _build(config: RewardConfig, context: RewardContext) -> Reward:
    spec = spec_of(config.kind)
    try:
        reward = spec.build(config, context)
        return await reward if inspect.isawaitable(reward) else reward
    except CapipeError:
        raise
    except Exception as error:
        if not spec.imported:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise BadInput(f"rewards: {config.kind} cannot be built ({reason}); change its options, or its code") from error
