"""Naturalness reward: mean token log-probability under a frozen language model (VLRM, arXiv 2404.01911)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ...models.dynamic_batcher import DynamicBatcher, most_on
from ...models.engines.base import Completion
from ...models.scorers.lm_scores import TextScorer, load_text_scorer
from ..dataset import Example
from .base import RewardConfig, RewardSpec, Scored


class NaturalnessConfig(RewardConfig):
    kind: Literal["naturalness"] = "naturalness"
    model: str = Field(description="a causal language model: bundled, a folder, a hub id; VLRM's is OPT-2.7B")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")


class NaturalnessReward:
    """(1/n) sum of log p over the caption's n tokens: minus the log of its perplexity.

    Surrounding whitespace is stripped, and captions are truncated to the model's context. A caption without tokens is
    unscored.
    """

    def __init__(self, scorer: TextScorer) -> None:
        self._model: DynamicBatcher[str, list[float]] = DynamicBatcher(scorer.logps, most_on(scorer.device))

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        logps = await self._model.ask(caption.text.strip())
        if not logps:
            return Scored(None, {"error": "an empty caption has no token to be likely"})
        value = sum(logps) / len(logps)
        if not math.isfinite(value):
            return Scored(None, {"error": "the model's log-probability is no number"})
        return Scored(value)

    async def aclose(self) -> None:
        await self._model.aclose()


def build_naturalness_reward(config: NaturalnessConfig) -> NaturalnessReward:
    """The reward with its model loaded. Raises BadInput if it is not a causal language model."""
    return NaturalnessReward(load_text_scorer(config.model, config.dtype, config.device))


SPEC = RewardSpec(NaturalnessConfig, lambda config, context: build_naturalness_reward(config))
