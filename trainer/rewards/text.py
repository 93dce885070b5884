"""Rewards from the caption's text only: length, repetition, boilerplate. Penalties are negative."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field

from ...models.engines.base import Completion
from ...stages.filter.ngrams import repeated_share, words_of
from ..dataset import Example
from .base import RewardConfig, RewardSpec, Scored
from .token_penalties import find_all, phrase_pattern


class LengthConfig(RewardConfig):
    """``hinge`` (CapRL++, arXiv 2606.09393): 1 up to ``free`` tokens, falling to 0 at ``most``. ``longer``: a control,

    which rewards nothing but tokens: their number divided by ``most``, at most 1.
    """

    kind: Literal["length"] = "length"
    shape: Literal["hinge", "longer"] = "hinge"
    free: int = Field(2048, ge=0, description="tokens that cost nothing")
    most: int = Field(3072, ge=1, description="tokens from which on the reward is 0 (hinge) or 1 (longer)")
    weight: float = 0.2


class LengthReward:
    def __init__(self, config: LengthConfig) -> None:
        self.config = config

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        return Scored(length_value(len(caption.token_ids), self.config))

    async def aclose(self) -> None: ...


def length_value(tokens: int, config: LengthConfig) -> float:
    """Length reward, from 0 to 1."""
    if config.shape == "longer":
        return min(1.0, tokens / config.most)
    if tokens <= config.free:
        return 1.0
    return max(0.0, 1 - (tokens - config.free) / max(1, config.most - config.free))


class RepetitionConfig(RewardConfig):
    kind: Literal["repetition"] = "repetition"


class RepetitionReward:
    """Minus the share of 4-grams that occurred before."""

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        return Scored(-repeated_share(words_of(caption.text)))

    async def aclose(self) -> None: ...


class BoilerplateConfig(RewardConfig):
    kind: Literal["boilerplate"] = "boilerplate"
    phrases: tuple[str, ...] = Field(
        (
            "here is a",
            "here is an",
            "here's a",
            "here's an",
            "sure,",
            "in summary",
            "overall,",
            "sufficient to answer",
            "this caption",
        ),
        description="phrases without which a caption says as much; case does not matter",
    )
    weight: float = 0.1


class BoilerplateReward:
    """Minus the number of listed phrases in the caption, found as whole words."""

    def __init__(self, config: BoilerplateConfig) -> None:
        self._patterns = {phrase: phrase_pattern(phrase) for phrase in config.phrases}

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        present = Counter(name for name, _ in find_all(self._patterns, caption.text))
        return Scored(-float(present.total()), {"phrases": dict(present)} if present else {})

    async def aclose(self) -> None: ...


LENGTH = RewardSpec(LengthConfig, lambda config, context: LengthReward(config))
REPETITION = RewardSpec(RepetitionConfig, lambda config, context: RepetitionReward())
BOILERPLATE = RewardSpec(BoilerplateConfig, lambda config, context: BoilerplateReward(config))
