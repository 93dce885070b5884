"""Naturalness is the mean log-probability of a caption's tokens; without a token there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from capipe.models.engines.base import Completion
from capipe.models.scorers.lm_scores import load_text_scorer
from capipe.trainer.dataset import Example
from capipe.trainer.rewards.naturalness import NaturalnessConfig, NaturalnessReward, build_naturalness_reward

from ...small_models import opt

TASK = Example("u" * 32, "k", "memory://x.tar", 0, 1, ())


def caption(text: str) -> Completion:
    return Completion(text, (1,), "stop", 1)


async def test_it_is_the_mean_over_the_captions_tokens(tmp_path: Path) -> None:
    folder = str(opt(tmp_path))
    reward = build_naturalness_reward(NaturalnessConfig(model=folder))
    texts = ("a red star", "Two shapes. A large red star is in the center.", " a red star\n")
    found = await asyncio.gather(*(reward.score(TASK, caption(text), "d") for text in texts))
    scorer = load_text_scorer(folder)
    for text, scored in zip(texts, found, strict=True):
        (logps,) = scorer.logps([text.strip()])
        assert scored.value == pytest.approx(sum(logps) / len(logps), abs=1e-5) and logps
    assert found[0].value == pytest.approx(found[2].value)  # blanks around it do not count
    await reward.aclose()


async def test_an_empty_caption_and_one_without_a_number_are_unscored(tmp_path: Path) -> None:
    reward = build_naturalness_reward(NaturalnessConfig(model=str(opt(tmp_path))))
    for text in ("", "  \n"):
        scored = await reward.score(TASK, caption(text), "d")
        assert scored.value is None and "empty caption" in scored.details["error"]
    await reward.aclose()

    class Broken:
        device = torch.device("cpu")

        def logps(self, texts: Sequence[str]) -> list[list[float]]:
            return [[-1.0, float("nan")] for _ in texts]

    broken = NaturalnessReward(Broken())  # type: ignore[arg-type]
    assert (await broken.score(TASK, caption("x"), "d")).details["error"].endswith("is no number")
    await broken.aclose()
