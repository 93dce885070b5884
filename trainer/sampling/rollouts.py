"""Rollouts: a group of captions per image from the current policy, each scored as soon as it is complete.

Or, for supervised training, groups of given captions.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...models.engines.base import Completion, Engine, GenerationRequest, Prompt, RequestError, Sampling
from ...models.engines.hf.model_adapter import PreparedPrompt
from ..dataset import Example
from ..images import Pictures
from ..policy.batch import Group
from ..rewards.base import RewardManager, Scored

Prepare = Callable[[Prompt], PreparedPrompt]  # to the policy's inputs: ids, positions, patches


@dataclass(frozen=True)
class RolloutSampling:
    """Sampling parameters: always the policy's full distribution, as top-p or top-k would bias the gradient.

    ``seed``: the run's. A caption's seed depends on it, the step, the image and the caption's number in the step.
    ``logprobs``: whether the engine reports log-probabilities of that distribution; those of another are not kept.
    """

    prompt: str
    group: int
    max_tokens: int
    temperature: float = 1.0
    seed: int = 0
    logprobs: bool = True

    def of(self, sample_id: str) -> Sampling:
        seed = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big") >> 1
        return Sampling(self.temperature, 1.0, self.max_tokens, seed)

    def sample_ids(self, step: int, uid: str, repeat: int) -> list[str]:
        """Ids of a group's captions. ``repeat``: previous occurrences of the image in the step."""
        numbers = range(repeat * self.group, (repeat + 1) * self.group)
        return [f"{self.seed}/{step}/{uid}/{number}" for number in numbers]


@dataclass(frozen=True)
class Rollout:
    """A process's groups of a step. ``replaced``: groups that others took the place of (dynamic sampling)."""

    groups: list[Group]
    replaced: list[Group] = field(default_factory=list)


class Rollouts:
    """Samples groups from an engine that has the policy's weights."""

    def __init__(self, engine: Engine, prepare: Prepare, pictures: Pictures, sampling: RolloutSampling) -> None:
        self.engine, self.sampling = engine, sampling
        self._prepare, self._pictures = prepare, pictures

    async def collect(self, examples: Sequence[tuple[Example, int]], step: int, rewards: RewardManager) -> list[Group]:
        """One group per example, in order, with rewards. A failed caption is left out; its group records the reason.

        ``examples``: each with its previous occurrences in the step, which change its captions' seeds.
        All images are decoded before the first request, so that the engine's batches, and with them the last bits of
        the log-probabilities, do not depend on the order of decoding. Raises EngineDead, and RunFailed if an image that
        was valid when listed cannot be decoded any more.
        """
        images = await asyncio.gather(*(self._pictures.of(example) for example, _ in examples))
        groups = (
            self._group(example, repeat, Prompt(self.sampling.prompt, image), step, rewards)
            for (example, repeat), image in zip(examples, images, strict=True)
        )
        return await asyncio.gather(*groups)

    async def refill(
        self,
        groups: list[Group],
        further: Sequence[Sequence[tuple[Example, int]]],
        step: int,
        rewards: RewardManager,
        is_tied: Callable[[Group], bool],
    ) -> Rollout:
        """Replace groups without a gradient by groups of further images (DAPO, arXiv 2503.14476 §3.2).

        ``further``: for each group the examples to try, one in each round. Rounds follow each other, so that the
        engine's batches do not depend on time. A group with fewer than two scores is kept: its rewards failed, and
        other images would hide that. A replacement without any caption takes no place.
        """
        groups, replaced = list(groups), []
        for examples in zip(*further, strict=True):
            places = [place for place, group in enumerate(groups) if _scores(group) > 1 and is_tied(group)]
            if not places:
                break
            sampled = await self.collect([examples[place] for place in places], step, rewards)
            for place, group in zip(places, sampled, strict=True):
                replaced.append(groups[place] if group.completions else group)
                groups[place] = group if group.completions else groups[place]
        return Rollout(groups, replaced)

    async def greedy(self, examples: Sequence[Example]) -> list[Completion | RequestError]:
        """Greedy caption of each example, for validation, or its error. Raises EngineDead."""
        sampling = Sampling(max_tokens=self.sampling.max_tokens)
        images = await asyncio.gather(*map(self._pictures.of, examples))
        prompts = [Prompt(self.sampling.prompt, image) for image in images]
        return await asyncio.gather(*(self._greedy(GenerationRequest(prompt, sampling)) for prompt in prompts))

    async def _greedy(self, request: GenerationRequest) -> Completion | RequestError:
        try:
            return await self.engine.generate(request)
        except RequestError as error:
            return error

    async def _group(self, example: Example, repeat: int, prompt: Prompt, step: int, rewards: RewardManager) -> Group:
        sample_ids = self.sampling.sample_ids(step, example.uid, repeat)
        outcomes = await asyncio.gather(*(self._caption(prompt, example, name, rewards) for name in sample_ids))
        scored = [outcome for outcome in outcomes if not isinstance(outcome, RequestError)]
        group = Group(example.uid, example.key, self._prepare(prompt), [caption for caption, _ in scored])
        group.failures = [str(outcome) for outcome in outcomes if isinstance(outcome, RequestError)]
        if scored:
            group.rewards = rewards.results([scores for _, scores in scored])
        return group

    async def _caption(
        self, prompt: Prompt, example: Example, sample_id: str, rewards: RewardManager
    ) -> tuple[Completion, dict[str, Scored]] | RequestError:
        request = GenerationRequest(prompt, self.sampling.of(sample_id), self.sampling.logprobs, tempered=True)
        try:
            caption = await self.engine.generate(request)
        except RequestError as error:
            return error
        return caption, await rewards.score(example, caption, sample_id)


def _scores(group: Group) -> int:
    return sum(reward.score is not None for reward in group.rewards)


class Demonstrations:
    """Groups of given captions for supervised training; nothing is sampled or scored.

    ``ids``: a caption's token ids with the token that ends it; ``max_tokens``: longest caption.
    """

    def __init__(
        self, prepare: Prepare, pictures: Pictures, prompt: str, ids: Callable[[str], list[int]], max_tokens: int
    ) -> None:
        self._prepare, self._pictures, self._prompt = prepare, pictures, prompt
        self._ids, self._max_tokens = ids, max_tokens

    async def collect(self, examples: Sequence[Example]) -> list[Group]:
        """One group per example with all its captions. One that is too long is left out; its group records that.

        Raises RunFailed as :meth:`Rollouts.collect`.
        """
        images = await asyncio.gather(*map(self._pictures.of, examples))
        return [
            self._group(example, Prompt(self._prompt, image)) for example, image in zip(examples, images, strict=True)
        ]

    def _group(self, example: Example, prompt: Prompt) -> Group:
        group = Group(example.uid, example.key, self._prepare(prompt))
        for text in example.captions:
            ids = self._ids(text)
            if len(ids) <= self._max_tokens:
                group.completions.append(Completion(text, tuple(ids), "stop", len(ids)))
            else:
                group.failures.append(f"a caption of {len(ids)} tokens is longer than rollout.max_tokens")
        return group
