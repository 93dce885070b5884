"""What is asked of the engine that draws captions, and when they are scored."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capipe.models.engines.base import Completion, GenerationRequest, Prompt, RequestError
from capipe.models.engines.hf.model_adapter import PreparedPrompt
from capipe.models.quiz import Question
from capipe.models.reader import QuizReader, ReaderConfig
from capipe.trainer.advantages import RewardTerm
from capipe.trainer.dataset import Example
from capipe.trainer.distributed import ALONE
from capipe.trainer.evaluation.validation import validate
from capipe.trainer.images import Pictures
from capipe.trainer.policy.batch import Group
from capipe.trainer.rewards.base import RewardManager, Scored
from capipe.trainer.sampling.rollouts import Demonstrations, Rollouts, RolloutSampling
from capipe.trainer.step_metrics import refill_metrics

from ...scripted import Scripted, knows
from ..rewards.test_judge import examples, jpeg

SAMPLING = RolloutSampling("Describe.", 3, 20, 0.9, seed=5)


def prepared(prompt: Prompt) -> PreparedPrompt:
    return PreparedPrompt(torch.arange(4), torch.arange(4)[None], 4, None)


class Lengths:
    """Scores by length, and remembers what it was asked and when."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        self.asked.append(sample_id)
        return Scored(float(caption.n_tokens))

    async def aclose(self) -> None: ...


def writes(request: GenerationRequest) -> Completion | RequestError:
    return Completion("a b", (1, 2), "stop", 2, (-0.1, -0.2))


@pytest.fixture
def two(tmp_path: Path) -> list[Example]:
    return examples(tmp_path / "a.tar", one=jpeg("red"), two=jpeg("blue"))


async def collect(two: list[Example], step: int, engine: Any, reward: Lengths) -> Any:
    rollouts = Rollouts(engine, prepared, Pictures(None), SAMPLING)
    return await rollouts.collect(
        [(example, 0) for example in two], step, RewardManager({"length": reward}, {"length": RewardTerm()})
    )


async def test_draws_have_full_support_and_a_seed_each(two: list[Example]) -> None:
    engine, again, later = Scripted(generate=writes), Scripted(generate=writes), Scripted(generate=writes)
    for step, each in ((0, engine), (0, again), (1, later)):
        await collect(two, step, each, Lengths())
    assert all((r.sampling.top_p, r.sampling.temperature, r.logprobs) == (1.0, 0.9, True) for r in engine.generations)
    seeds, same, others = ([r.sampling.seed for r in each.generations] for each in (engine, again, later))
    assert len(set(seeds)) == 6 and seeds == same and not set(seeds) & set(others)


async def test_an_image_that_a_step_has_twice_gets_other_captions_the_second_time(two: list[Example]) -> None:
    engine = Scripted(generate=writes)
    rollouts = Rollouts(engine, prepared, Pictures(None), SAMPLING)
    turns = [(two[0], 0), (two[0], 1), (two[1], 0)]
    await rollouts.collect(turns, 0, RewardManager({"length": Lengths()}, {"length": RewardTerm()}))
    assert len({request.sampling.seed for request in engine.generations}) == 3 * SAMPLING.group


async def test_a_caption_is_scored_when_it_ends(two: list[Example]) -> None:
    reward = Lengths()
    scored_before_the_last: list[int] = []

    class Slow(Scripted):
        async def generate(self, request: GenerationRequest) -> Completion:
            self.generations.append(request)
            if len(self.generations) == 6:  # the last one waits until all others have been scored
                while len(reward.asked) < 5:
                    await asyncio.sleep(0)
                scored_before_the_last.append(len(reward.asked))
            return Completion("a", (1,), "stop", 1, (-0.1,))

    await asyncio.wait_for(collect(two, 0, Slow(), reward), 20)
    assert scored_before_the_last == [5] and len(reward.asked) == 6


async def test_a_caption_that_fails_is_left_out_of_its_group(two: list[Example]) -> None:
    count = 0

    def fails(request: GenerationRequest) -> Completion | RequestError:
        nonlocal count
        count += 1
        return RequestError("too long") if count == 2 else Completion("a", (1,) * count, "stop", count, (0.0,) * count)

    first, second = await collect(two, 0, Scripted(generate=fails), Lengths())
    assert [len(group.completions) for group in (first, second)] == [2, 3]
    assert [reward.score for reward in first.rewards] == [1.0, 3.0] and (first.key, second.key) == ("one", "two")
    assert (first.failures, second.failures) == (["too long"], [])


async def test_a_caption_that_fails_in_validation_is_left_out_and_counted(two: list[Example]) -> None:
    count = 0

    def fails(request: GenerationRequest) -> Completion | RequestError:
        nonlocal count
        count += 1
        return RequestError("timed out") if count == 1 else Completion("a star", (1, 2), "length", 2)

    rollouts = Rollouts(Scripted(generate=fails), prepared, Pictures(None), SAMPLING)
    captions = await rollouts.greedy(two)
    assert isinstance(captions[0], RequestError) and isinstance(captions[1], Completion)
    question = Question("What?", ("star", "circle"), 0)
    asked = [replace(example, questions=(question,)) for example in two]
    reader = QuizReader(Scripted(lambda request: knows(request, "star")), ReaderConfig())
    found = await validate(asked, captions, reader)
    assert (found.images, found.failed, found.reason, found.accuracy) == (1, 1, "timed out", 1.0)
    assert (found.tokens, found.truncated) == (2, 1) and "reason" not in found.metrics()
    none = await validate(asked, [RequestError("gone"), RequestError("too")], reader)
    assert none.metrics() == {"images": 0, "failed": 2} and none.reason == "gone"


# --- groups of further images, given captions -------------------------------------------------------------------------


def equal_for(*colors: bytes) -> Any:
    """Captions of three lengths, but of one length for these images."""

    def writes_of(request: GenerationRequest) -> Completion:
        image = request.prompt.image
        assert image is not None and image.encoded is not None
        count = 1 if image.encoded in colors else 1 + request.sampling.seed % 5
        return Completion("a", (1,) * count, "stop", count, (0.0,) * count)

    return writes_of


def differ(group: Group) -> bool:
    return len({reward.score for reward in group.rewards}) > 1


async def test_tied_groups_are_replaced_round_by_round(tmp_path: Path) -> None:
    files = {"one": jpeg("red"), "two": jpeg("blue"), "three": jpeg("green"), "four": jpeg("white")}
    one, two, three, four = examples(tmp_path / "a.tar", **files)
    engine = Scripted(generate=equal_for(files["one"], files["three"]))
    rollouts = Rollouts(engine, prepared, Pictures(None), replace(SAMPLING, group=8))
    rewards = RewardManager({"length": Lengths()}, {"length": RewardTerm()})
    groups = await rollouts.collect([(one, 0), (two, 0)], 0, rewards)
    assert [differ(group) for group in groups] == [False, True]
    further = [[(three, 0), (four, 0), (two, 1)], [(one, 1), (one, 2), (one, 3)]]
    refilled = await rollouts.refill(groups, further, 0, rewards, lambda group: not differ(group))
    assert [group.key for group in refilled.groups] == ["four", "two"] and refilled.groups[1] is groups[1]
    assert [group.key for group in refilled.replaced] == ["one", "three"]
    assert len(engine.generations) == 4 * 8  # the second place needed none
    bounded = await rollouts.refill(
        groups, [place[:1] for place in further], 0, rewards, lambda group: not differ(group)
    )
    assert [group.key for group in bounded.groups] == ["three", "two"]  # tied still, and the rounds are over


async def test_groups_that_failed_are_not_refilled(two: list[Example]) -> None:
    reward, failing = Lengths(), Scripted(generate=lambda request: RequestError("gone"))
    rewards = RewardManager({"length": reward}, {"length": RewardTerm()})
    rollouts = Rollouts(failing, prepared, Pictures(None), SAMPLING)
    groups = await rollouts.collect([(two[0], 0)], 0, rewards)
    kept = await rollouts.refill(groups, [[(two[1], 0)]], 0, rewards, lambda group: True)
    assert kept.groups == groups and kept.replaced == [] and len(failing.generations) == 3
    good = await Rollouts(Scripted(generate=writes), prepared, Pictures(None), SAMPLING).collect(
        [(two[0], 0)], 0, rewards
    )
    tried = await rollouts.refill(good, [[(two[1], 0)]], 0, rewards, lambda group: True)
    assert tried.groups == good  # a replacement without captions takes no place, but its failures count
    metrics = refill_metrics(tried.replaced, ALONE)
    assert (metrics["refilled"], metrics["captions_failed"], metrics["failure"]) == (1, 3, "gone")


async def test_given_captions_are_completions_unless_they_are_too_long(two: list[Example]) -> None:
    given = [replace(two[0], captions=("ab", "abcdef")), replace(two[1], captions=("abc",))]
    ids = lambda text: [*text.encode(), 0]  # noqa: E731
    first, second = await Demonstrations(prepared, Pictures(None), "Describe.", ids, 4).collect(given)
    assert [caption.token_ids for caption in first.completions] == [(97, 98, 0)]
    assert first.failures == ["a caption of 7 tokens is longer than rollout.max_tokens"]
    assert [(caption.text, caption.finish_reason, caption.n_tokens) for caption in second.completions] == [
        ("abc", "stop", 4)
    ]
