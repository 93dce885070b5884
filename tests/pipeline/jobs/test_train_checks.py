"""Before training: a caption of a single sentence fits the model that checks sentences."""

from __future__ import annotations

from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.models.bundled import folder_of
from capipe.models.engines.prompting import PromptEncoder
from capipe.pipeline.jobs.train_checks import check_fits
from capipe.trainer.advantages import RewardTerm
from capipe.trainer.dataset import ExampleList
from capipe.trainer.recipe import Recipe
from capipe.trainer.rewards.base import RewardManager
from capipe.trainer.rewards.verified import VerifiedReward, VerifiedRewardConfig

from ...scripted import Scripted


async def checked(context: int | None, max_tokens: int) -> None:
    from transformers import AutoTokenizer

    encoder = PromptEncoder(AutoTokenizer.from_pretrained(folder_of("captioner")), None)
    engine = Scripted(lambda request: [0.0, 0.0])
    engine.context = context
    reward = VerifiedReward(engine, VerifiedRewardConfig(model="small-vlm"), encoder.decode)
    rewards = RewardManager({"verified": reward}, {"verified": RewardTerm()})
    settings: dict[str, Any] = {
        "model": "tiny/captioner",
        "data": {"shards": "shards"},
        "rewards": [{"kind": "verified", "model": "small-vlm"}],
        "rollout": {"max_tokens": max_tokens},
    }
    await check_fits(Recipe.model_validate(settings), rewards, None, ExampleList((), "", 0), None, encoder)


async def test_a_caption_that_may_be_one_sentence_has_room() -> None:
    await checked(400, 100)
    await checked(None, 100_000)  # a server that hides its context says so caption by caption
    with pytest.raises(BadInput, match=r"300 tokens, if it is a single sentence, .* small-vlm, which has room for \d+"):
        await checked(200, 300)
