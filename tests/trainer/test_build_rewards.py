"""From a recipe's rewards to a judge; and what captions of any image earn by it before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from capipe.errors import BadInput
from capipe.models.bundled import folder_of
from capipe.models.engines.base import Completion
from capipe.models.engines.prompting import PromptEncoder
from capipe.models.tiny.world.corpus import samples
from capipe.trainer.dataset import Example
from capipe.trainer.preflight import GENERIC, Control, controls, template_warnings
from capipe.trainer.rewards.base import RewardConfig
from capipe.trainer.rewards.build import build_reward_manager
from capipe.trainer.rewards.image_text import ImageTextReward
from capipe.trainer.rewards.kinds import RewardEntry

from ..small_models import opt
from .rewards.test_judge import examples


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    from transformers import AutoTokenizer

    return PromptEncoder(AutoTokenizer.from_pretrained(folder_of("captioner")), None)


def configs(*entries: dict[str, Any]) -> list[RewardConfig]:
    return [TypeAdapter(RewardEntry).validate_python(entry) for entry in entries]


async def test_controls_are_scored_by_every_reward(tmp_path: Path, encoder: PromptEncoder) -> None:
    rendered = [(sample.image, sample.scene) for sample in samples(4, "heldout", seed=5)]
    plain = examples(tmp_path / "a.tar", **{f"n{number}": image for number, (image, _) in enumerate(rendered)})
    shown = [
        Example(example.uid, example.key, example.url, example.offset, example.size, (), scene)
        for example, (_, scene) in zip(plain, rendered, strict=True)
    ]
    judge = await build_reward_manager(
        configs(
            {"kind": "clip", "model": "tiny/clip", "weight": 2.0},
            {"kind": "naturalness", "model": str(opt(tmp_path / "opt"))},
            {"kind": "repeats", "n": 1},
            {"kind": "phrases"},
            {"kind": "repetition"},
        ),
        encoder.decode,
    )
    try:
        assert list(judge.rewards) == judge.metrics == ["clip", "naturalness", "repeats", "phrases", "repetition"]
        found = await controls(judge, shown, encoder.text_ids)
        assert found.true["clip"] > found.generic["clip"] + 0.1  # tiny/clip has seen such images
        assert "naturalness" in found.generic and "naturalness" not in found.empty
        assert found.true["repeats"] < -1 and found.empty["repeats"] == found.generic["phrases"] == 0
        (first, *_) = found.lines()
        assert first.startswith("preflight: clip: generic 0.") and ", true 0." in first
        assert (await controls(judge, plain, encoder.text_ids)).true == {}  # nothing is known of other images
        by_hand = await judge.score(shown[0], Completion(GENERIC, tuple(encoder.text_ids(GENERIC)), "stop", 9), "d")
        only = await controls(judge, shown[:1], encoder.text_ids)
        assert only.generic == pytest.approx({name: each.value for name, each in by_hand.items()}, abs=1e-5)
    finally:
        await judge.aclose()


def test_a_template_that_beats_the_policy_is_warned_of() -> None:
    generic = {"clip": 0.4, "naturalness": -1.0, "itm": 1.0}
    figures = {"reward/clip": 0.3, "reward/naturalness": -3.0, "reward/itm": 2.0}
    (warning,) = template_warnings(generic, figures)
    assert warning.startswith("warning: clip: a generic caption earns 0.400, the first step's captions 0.300")
    assert template_warnings(generic, {}) == template_warnings({}, figures) == []
    assert Control({"itm": 0.5}, {}, {"itm": 1.5}).lines() == ["preflight: itm: generic 0.500, true 1.500"]


async def test_what_was_started_is_closed_where_the_next_cannot_be(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    close = ImageTextReward.aclose

    async def noted(self: ImageTextReward) -> None:
        closed.append("clip")
        await close(self)

    monkeypatch.setattr(ImageTextReward, "aclose", noted)
    wrong = configs({"kind": "clip", "model": "tiny/clip"}, {"kind": "naturalness", "model": "nowhere"})
    with pytest.raises(BadInput, match="nowhere: no such model folder"):
        await build_reward_manager(wrong, encoder.decode)
    assert closed == ["clip"]
