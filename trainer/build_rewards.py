"""From a recipe's list of rewards to a judge with its models loaded."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.engines.context import quiz_room
from ..models.engines.loading import EngineConfig, load_engine
from ..models.reader import QuizReader
from .advantages import RewardTerm
from .build import load_reader
from .recipe import RewardConfig
from .rewards.base import Reward, RewardManager
from .rewards.image_text import BlipRewardConfig, ClipRewardConfig, ItmRewardConfig, build_image_text_reward
from .rewards.judge import JudgeReward, JudgeRewardConfig
from .rewards.naturalness import NaturalnessConfig, build_naturalness_reward
from .rewards.quiz import QuizReward, QuizRewardConfig, reader_config
from .rewards.reconstruction import ReconstructionConfig, build_reconstruction_reward
from .rewards.text import BoilerplateConfig, BoilerplateReward, LengthConfig, LengthReward, RepetitionReward
from .rewards.token_penalties import Decode, PhrasesConfig, PhrasesReward, RepeatsConfig, RepeatsReward


async def build_reward_manager(
    configs: Sequence[RewardConfig], decode: Decode, caption_tokens: int | None = None
) -> RewardManager:
    """The rewards of a recipe, engines started. ``decode``: a completion's ids to text by the policy's tokenizer.

    ``caption_tokens``: the longest caption, by which engines make room; as much as their models take where None.
    Raises BadInput for a model that is not there or of a wrong kind; what was started by then is closed.
    """
    rewards: dict[str, Reward] = {}
    try:
        for config in configs:
            rewards[config.kind] = await _reward(config, decode, caption_tokens)
    except BaseException:
        for reward in rewards.values():
            await reward.aclose()
        raise
    return RewardManager(rewards, {config.kind: RewardTerm(config.weight, config.normalise) for config in configs})


async def _reward(config: RewardConfig, decode: Decode, caption_tokens: int | None) -> Reward:
    match config:
        case QuizRewardConfig():
            asks = reader_config(config)
            engine = await load_reader(config.reader, config.engine, caption_tokens, asks, config.template_args)
            reader = QuizReader(engine, asks)
            await _check_served(reader, config.engine)
            return QuizReward(reader, config)
        case JudgeRewardConfig():
            room = None if caption_tokens is None else quiz_room(caption_tokens, 1 + config.thought_tokens)
            asked = EngineConfig(config.engine, config.model, room=room, template_args=config.template_args)
            return JudgeReward(await load_engine(asked), config)
        case ClipRewardConfig() | BlipRewardConfig() | ItmRewardConfig():
            return build_image_text_reward(config)
        case NaturalnessConfig():
            return build_naturalness_reward(config)
        case ReconstructionConfig():
            return build_reconstruction_reward(config)
        case PhrasesConfig():
            return PhrasesReward(config, decode)
        case RepeatsConfig():
            return RepeatsReward(config, decode)
        case LengthConfig():
            return LengthReward(config)
        case BoilerplateConfig():
            return BoilerplateReward(config)
        case _:
            return RepetitionReward()


async def _check_served(reader: QuizReader, engine: str) -> None:
    """Raise BadInput where what answers at a URL cannot be a reader; the engine is closed then."""
    try:
        if "://" in engine:
            await reader.check()
    except BaseException:
        await reader.engine.aclose()
        raise
