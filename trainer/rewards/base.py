"""The plug-in interface of rewards, and how a step's captions are scored by several of them at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...models.engines.base import Completion, EngineDead
from ..advantages import RewardTerm, combine
from ..dataset import Example
from ..policy.batch import RewardResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """What one reward says of a caption: ``value`` None where it could not be told, which is never zero.

    ``details`` go to the log; ``per_token``: what the caption's single tokens earned of ``value``, where it can tell.
    """

    value: float | None
    details: Mapping[str, Any] = field(default_factory=dict)
    per_token: tuple[float, ...] = ()


class Reward(Protocol):
    """``draw`` names the caption uniquely (run's seed, step, image, number): the source of whatever is drawn at random.

    May raise anything: the caption then counts as unscored. EngineDead ends the run. ``figures``, where a reward has
    them: names of numbers in its ``details`` whose means over a step are logged, too.
    """

    async def score(self, task: Example, caption: Completion, draw: str) -> Scored: ...

    async def aclose(self) -> None: ...


class RewardManager:
    """Scores captions by all rewards, each weighed by its part."""

    def __init__(self, rewards: Mapping[str, Reward], parts: Mapping[str, RewardTerm]) -> None:
        self.rewards, self.parts = dict(rewards), dict(parts)
        told = {name: getattr(reward, "figures", ()) for name, reward in rewards.items()}
        self._more = {f"{name}_{figure}": (name, figure) for name, figures in told.items() for figure in figures}

    @property
    def figures(self) -> list[str]:
        """What results have components of: each reward by name, and what more a reward tells (``NAME_FIGURE``)."""
        return [*self.rewards, *self._more]

    async def score(self, task: Example, caption: Completion, draw: str) -> dict[str, Scored]:
        """All rewards of one caption, by name; raises EngineDead alone."""
        scored = await asyncio.gather(*(self._one(name, task, caption, draw) for name in self.rewards))
        return dict(zip(self.rewards, scored, strict=True))

    async def _one(self, name: str, task: Example, caption: Completion, draw: str) -> Scored:
        try:
            return await self.rewards[name].score(task, caption, draw)
        except EngineDead:
            raise
        except Exception as error:  # a plug-in's fault costs one caption's score, and is said
            reason = f"{type(error).__name__}: {error}"
            logger.warning("reward %s could not score a caption of %s: %s", name, task.key, reason)
            return Scored(None, {"error": reason})

    def results(self, captions: Sequence[Mapping[str, Scored]]) -> list[RewardResult]:
        """A group's results: components weighed and summed, normalised within the group first where a part says so."""
        components = {name: _column([each[name].value for each in captions]) for name in self.rewards}
        totals = combine(components, self.parts).tolist()
        return [
            RewardResult(
                score=None if total != total else total,
                components={name: scored.value for name, scored in caption.items()} | self._more_components(caption),
                per_token=self._per_token(caption),
                details={name: dict(scored.details) for name, scored in caption.items() if scored.details},
            )
            for total, caption in zip(totals, captions, strict=True)
        ]

    def _more_components(self, caption: Mapping[str, Scored]) -> dict[str, float | None]:
        return {told: caption[name].details.get(figure) for told, (name, figure) in self._more.items()}

    def _per_token(self, caption: Mapping[str, Scored]) -> list[float]:
        rows = [(self.parts[name].weight, scored.per_token) for name, scored in caption.items() if scored.per_token]
        return [
            sum(weight * value for (weight, _), value in zip(rows, place, strict=True))
            for place in zip(*(row for _, row in rows), strict=True)
        ]

    async def aclose(self) -> None:
        for reward in self.rewards.values():
            await reward.aclose()


def _column(values: Sequence[float | None]) -> Tensor:
    """(completions,), NaN where unscored."""
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)
