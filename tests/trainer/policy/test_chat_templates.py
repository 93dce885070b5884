"""Training asks the policy, its readers and its judges by their own templates, and checkpoints keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.manifests.fingerprint import fingerprint
from capipe.models.bundled import folder_of
from capipe.models.engines.base import Completion, ImageInput, Prompt
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.trainer.build import build_policy, write_policy
from capipe.trainer.dataset import Example
from capipe.trainer.recipe import Recipe
from capipe.trainer.rewards.build import build_reward_manager
from capipe.trainer.rewards.judge import JudgeReward, JudgeRewardConfig
from capipe.trainer.rewards.quiz import QuizReward, QuizRewardConfig, reader_config

from ...models.conftest import PLAIN
from ...models.engines.test_thinking import Thoughtful, writes
from ...models.folders import TEXT_ONLY, copied, own_template, two_templates

MOOD = "{% if mood is defined %}{{ mood }}: {% endif %}"


def recipe(model: Path, **more: Any) -> Recipe:
    given = {"model": str(model), "data": {"shards": "a", "questions": "b"}, "rewards": [{"kind": "quiz"}]}
    return Recipe.model_validate({**given, "device": "cpu", **more})


def test_a_policy_is_asked_as_the_engines_ask_it_and_its_checkpoints_are(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    parts = build_policy(recipe(two_templates(tmp_path / "start")))
    bundled = build_policy(recipe(folder_of("captioner")))
    prompt = Prompt(PLAIN, ImageInput("u"))
    wanted = bundled.preparing.encoder.encode(prompt)
    assert parts.preparing.encoder.encode(prompt) == wanted
    write_policy(parts, tmp_path / "checkpoint", {})
    resumed = build_policy(recipe(tmp_path / "start"), tmp_path / "checkpoint")
    assert resumed.preparing.encoder.encode(prompt) == wanted
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "checkpoint")
    assert processor.chat_template == own_template("captioner")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        (TEXT_ONLY, "fails on a chat with an image"),
        ("{{ raise_exception('no chats today') }}", "no chats today"),
    ],
)
def test_a_policy_that_cannot_be_asked_is_refused(template: str | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=reason) as caught:
        build_policy(recipe(copied("captioner", tmp_path / "start", template)))
    assert "\n" not in str(caught.value) and str(tmp_path / "start") in str(caught.value)


def test_arguments_of_a_recipe_reach_the_policys_template(tmp_path: Path) -> None:
    start = copied("captioner", tmp_path / "start", MOOD + own_template("captioner"))
    parts = build_policy(recipe(start, template_args={"mood": "wild"}))
    encoder = parts.preparing.encoder
    assert encoder.decode(list(encoder.encode(Prompt("Hm")))).startswith("wild: user\nHm")
    with pytest.raises(BadInput, match="moods: no argument of the chat template"):
        build_policy(recipe(start, template_args={"moods": "wild"}))
    with pytest.raises(BadInput, match="reads no chat template"):
        build_policy(recipe(folder_of("blip2"), template_args={"mood": "wild"}, prompt=""))


def test_keys_that_came_later_change_no_run_that_does_without_them(tmp_path: Path) -> None:
    def semantic(**more: Any) -> dict[str, Any]:
        validation = {"shards": "c", "questions": "d", **more.pop("validation", {})}
        rewards = [{"kind": "quiz", **more.pop("quiz", {})}, {"kind": "judge", "model": "m", **more.pop("judge", {})}]
        return recipe(tmp_path, rewards=rewards, validation=validation, **more).semantic()

    plain = semantic()
    assert "template_args" not in plain and "template_args" not in plain["validation"]
    assert all({"template_args", "thought_tokens"}.isdisjoint(each) for each in plain["rewards"])
    given = {"template_args": {"enable_thinking": False}}
    others = [semantic(**given), *(semantic(**{part: given}) for part in ("validation", "quiz", "judge"))]
    others.append(semantic(quiz={"thought_tokens": 9}))
    assert len({fingerprint(each) for each in [plain, *others]}) == 6


async def test_arguments_of_a_reward_reach_its_readers_template(tmp_path: Path) -> None:
    folder = copied("reader", tmp_path / "reader", MOOD + own_template("reader"))
    config = QuizRewardConfig(reader=str(folder), engine="transformers", template_args={"mood": "wild"})
    judge = await build_reward_manager([config], lambda ids: "")
    reward = judge.rewards["quiz"]
    assert isinstance(reward, QuizReward) and isinstance(reward.reader.engine, TransformersEngine)
    encoder = reward.reader.engine.lm.encoder
    assert encoder.decode(list(encoder.encode(Prompt("Hm")))).startswith("wild: ")
    await judge.aclose()
    marks = JudgeRewardConfig(model=str(folder), engine="transformers", template_args={"moods": "wild"})
    with pytest.raises(BadInput, match="moods: no argument"):
        await build_reward_manager([marks], lambda ids: "")
    assert reader_config(QuizRewardConfig(thought_tokens=9)).thought_tokens == 9


async def test_a_judge_marks_after_its_thought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Thoughtful(lambda request: [0.0, -50.0], writes("<think>Bad.</think>1"))
    reward = JudgeReward(engine, JudgeRewardConfig(model="any", marks=("1", "2"), thought_tokens=33))

    async def pixels(example: Example) -> ImageInput:
        return ImageInput(example.uid)

    monkeypatch.setattr(reward._pictures, "of", pixels)
    example = Example("u" * 32, "k", "a.tar", 0, 1, ())
    scored = await reward.score(example, Completion("a dog", (1,), "stop", 1), "draw")
    assert (scored.value, scored.details) == (pytest.approx(0.0), {"thought_cut": False})
    assert [each.prompt.thought for each in engine.choices] == ["Bad."]
    assert [each.sampling.max_tokens for each in engine.generations] == [33]
    await reward.aclose()
