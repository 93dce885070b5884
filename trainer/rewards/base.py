"""Plug-in interface of rewards, and the manager that scores captions with several of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pydantic import ConfigDict
from torch import Tensor

from ...manifests.configuration import Growing
from ...models.engines.base import Completion, EngineDead
from ..advantages import RewardTerm, combine
from ..dataset import Example
from ..policy.batch import RewardResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """One reward of a caption: ``value``, None (never 0) if it could not be computed.

    ``details``: for the log; ``per_token``: per-token parts of ``value``, if any.
    """

    value: float | None
    details: Mapping[str, Any] = field(default_factory=dict)
    per_token: tuple[float, ...] = ()


class RewardConfig(Growing):
    """An entry of a recipe's ``rewards``. A kind with options of its own adds them in a subclass.

    ``kind``: a built-in name or an import path; ``weight``: factor in a caption's score; ``normalise``: bring the
    reward to mean 0 and standard deviation 1 within each group first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    weight: float = 1.0
    normalise: bool = False


class Reward(Protocol):
    """Plug-in interface. ``sample_id``: unique id of the caption (run's seed, step, image, number); use it to seed all
    randomness.

    May raise any exception: the caption then counts as unscored. EngineDead ends the run. An optional attribute
    ``metrics`` names numbers in ``details`` whose means over a step are logged as well.
    """

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored: ...

    async def aclose(self) -> None:
        """Release the reward's resources."""
        return None


@dataclass(frozen=True)
class RewardContext:
    """The run that rewards are built for.

    ``decode``: a completion's ids to text with the policy's tokenizer, without special tokens; ``caption_tokens``:
    longest caption, None if unknown.
    """

    decode: Callable[[list[int]], str]
    caption_tokens: int | None


@dataclass(frozen=True)
class RewardSpec:
    """A kind of reward: its config class and its builder.

    ``of_image``: compares caption and image, so that a generic caption must not win; ``imported``: a user's own.
    """

    config: type[RewardConfig]
    build: Callable[[Any, RewardContext], Reward | Awaitable[Reward]]
    of_image: bool = False
    imported: bool = False


class RewardManager:
    """Scores captions with all rewards, each weighted by its term."""

    def __init__(self, rewards: Mapping[str, Reward], terms: Mapping[str, RewardTerm]) -> None:
        self.rewards, self.terms = dict(rewards), dict(terms)
        self._details = {
            f"{name}_{detail}": (name, detail)
            for name, reward in rewards.items()
            for detail in getattr(reward, "metrics", ())
        }

    @property
    def metrics(self) -> list[str]:
        """Names of the results' components: each reward, and ``NAME_DETAIL`` for a reward's ``metrics``."""
        return [*self.rewards, *self._details]

    async def score(self, example: Example, caption: Completion, sample_id: str) -> dict[str, Scored]:
        """All rewards of one caption, by name. Raises only EngineDead."""
        scored = await asyncio.gather(*(self._one(name, example, caption, sample_id) for name in self.rewards))
        return dict(zip(self.rewards, scored, strict=True))

    async def _one(self, name: str, example: Example, caption: Completion, sample_id: str) -> Scored:
        try:
            return await self.rewards[name].score(example, caption, sample_id)
        except EngineDead:
            raise
        except Exception as error:  # an error in a plug-in costs one caption's score, and is logged
            reason = f"{type(error).__name__}: {error}"
            logger.warning("reward %s could not score a caption of %s: %s", name, example.key, reason)
            return Scored(None, {"error": reason})

    def results(self, captions: Sequence[Mapping[str, Scored]]) -> list[RewardResult]:
        """Results of a group: weighted sum of components, first normalised within the group if the term says so."""
        components = {name: _column([caption[name].value for caption in captions]) for name in self.rewards}
        totals = combine(components, self.terms).tolist()
        return [
            RewardResult(
                score=None if total != total else total,
                components={name: scored.value for name, scored in caption.items()} | self._detail_components(caption),
                per_token=self._per_token(caption),
                details={name: dict(scored.details) for name, scored in caption.items() if scored.details},
            )
            for total, caption in zip(totals, captions, strict=True)
        ]

    def _detail_components(self, caption: Mapping[str, Scored]) -> dict[str, float | None]:
        return {metric: caption[name].details.get(detail) for metric, (name, detail) in self._details.items()}

    def _per_token(self, caption: Mapping[str, Scored]) -> list[float]:
        rows = [(self.terms[name].weight, scored.per_token) for name, scored in caption.items() if scored.per_token]
        return [
            sum(weight * value for (weight, _), value in zip(rows, values, strict=True))
            for values in zip(*(row for _, row in rows), strict=True)
        ]

    async def aclose(self) -> None:
        for reward in self.rewards.values():
            await reward.aclose()


def _column(values: Sequence[float | None]) -> Tensor:
    """(completions,), NaN where unscored."""
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)
