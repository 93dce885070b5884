"""Rollouts: several captions of each image from the current policy, each scored the moment it ends."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..models.engines.base import Completion, Engine, GenerationRequest, Prompt, RequestError, Sampling
from ..models.engines.hf.model_adapter import PreparedPrompt
from .dataset import Example
from .images import Pictures
from .policy.batch import Group
from .rewards.base import RewardManager, Scored

Prepare = Callable[[Prompt], PreparedPrompt]  # the ids, positions and patches that the policy reads


@dataclass(frozen=True)
class RolloutSampling:
    """How captions are drawn: always from the policy's whole distribution, as cut ones would bias the gradient.

    ``seed``: the run's; draws depend on it, the step, the image and the number of its caption in the step alone.
    """

    prompt: str
    group: int
    max_tokens: int
    temperature: float = 1.0
    seed: int = 0

    def sampling(self, draw: str) -> Sampling:
        seed = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:8], "big") >> 1
        return Sampling(self.temperature, 1.0, self.max_tokens, seed)


class Rollouts:
    """Samples groups from an engine that has the policy's weights."""

    def __init__(self, engine: Engine, prepare: Prepare, pictures: Pictures, drawing: RolloutSampling) -> None:
        self.engine, self.drawing = engine, drawing
        self._prepare, self._pictures = prepare, pictures

    async def collect(self, turns: Sequence[tuple[Example, int]], step: int, judge: RewardManager) -> list[Group]:
        """One group per task, in order, with rewards; a caption that could not be sampled is left out of its group,
        which has the reason.

        ``turns``: tasks, each with how often the step has had it before, since its captions are to be others then.
        All images are decoded before the first caption is asked for, so that the engine's batches, and with them the
        last bits of what is sampled, do not depend on who decoded first. Raises EngineDead, and RunFailed where an
        image that was fine when listed cannot be decoded any more.
        """
        images = await asyncio.gather(*(self._pictures.of(task) for task, _ in turns))
        prompts = [Prompt(self.drawing.prompt, image) for image in images]
        groups = (
            self._group(task, turn, prompt, step, judge) for (task, turn), prompt in zip(turns, prompts, strict=True)
        )
        return await asyncio.gather(*groups)

    async def greedy(self, tasks: Sequence[Example]) -> list[Completion | RequestError]:
        """The likeliest caption of each task, for validation, or why there is none. Raises EngineDead."""
        sampling = Sampling(max_tokens=self.drawing.max_tokens)
        prompts = [Prompt(self.drawing.prompt, image) for image in await asyncio.gather(*map(self._pictures.of, tasks))]
        return await asyncio.gather(*(self._greedy(GenerationRequest(each, sampling)) for each in prompts))

    async def _greedy(self, request: GenerationRequest) -> Completion | RequestError:
        try:
            return await self.engine.generate(request)
        except RequestError as error:
            return error

    async def _group(self, task: Example, turn: int, prompt: Prompt, step: int, judge: RewardManager) -> Group:
        size = self.drawing.group
        draws = [f"{self.drawing.seed}/{step}/{task.uid}/{number}" for number in range(turn * size, (turn + 1) * size)]
        outcomes = await asyncio.gather(*(self._caption(prompt, task, draw, judge) for draw in draws))
        kept = [outcome for outcome in outcomes if not isinstance(outcome, RequestError)]
        group = Group(task.uid, task.key, self._prepare(prompt), [caption for caption, _ in kept])
        group.failures = [str(outcome) for outcome in outcomes if isinstance(outcome, RequestError)]
        if kept:
            group.rewards = judge.results([scored for _, scored in kept])
        return group

    async def _caption(
        self, prompt: Prompt, task: Example, draw: str, judge: RewardManager
    ) -> tuple[Completion, dict[str, Scored]] | RequestError:
        request = GenerationRequest(prompt, self.drawing.sampling(draw), logprobs=True)
        try:
            caption = await self.engine.generate(request)
        except RequestError as error:
            return error
        return caption, await judge.score(task, caption, draw)
