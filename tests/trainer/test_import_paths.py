"""Rewards and losses by import path: what is found, what is refused, and what a run's fingerprint has of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from capipe.errors import BadInput
from capipe.models.engines.base import Completion
from capipe.trainer.dataset import Example
from capipe.trainer.losses import LOSSES, find_loss
from capipe.trainer.recipe import load_recipe
from capipe.trainer.rewards.build import build_reward_manager

MODULE = """
from capipe.trainer.losses import PolicyLoss, policy_gradient
from capipe.trainer.rewards.base import Reward, RewardConfig, Scored


class BrevityConfig(RewardConfig):
    most: int
    weight: float = 0.5


class Brevity(Reward):
    Config = BrevityConfig

    def __init__(self, config):
        if config.most == 0:
            raise ValueError("most\\nis zero")
        self.config = config

    async def score(self, example, caption, sample_id):
        return Scored(min(1.0, self.config.most / len(caption.token_ids)))


class Constant:
    def __init__(self, config):
        self.config = config

    async def score(self, example, caption, sample_id):
        return Scored(1.0)

    async def aclose(self): ...


class Synchronous(Constant):
    def score(self, example, caption, sample_id): ...


class OtherConfig(Constant):
    Config = dict


mean = PolicyLoss(policy_gradient, "token")
number = 3
"""
TEXT = """
model: tiny/captioner
data: {shards: a}
rewards:
  - {kind: "plugins_of_a_user:Brevity", most: 4}
  - {kind: "plugins_of_a_user:Constant", weight: 2.0}
  - {kind: length}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "plugins_of_a_user.py").write_text(MODULE)
    (tmp_path / "broken_plugin.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "plugins_of_a_user", raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


async def test_rewards_of_a_users_module_score_beside_built_in_ones(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert [(reward.weight, reward.normalise) for reward in loaded.rewards] == [
        (0.5, False),
        (2.0, False),
        (0.2, False),
    ]
    rewards = await build_reward_manager(loaded.rewards, lambda ids: "")
    example, caption = Example("u" * 32, "k", "a.tar", 0, 1, ()), Completion("a b", tuple(range(8)), "stop", 8)
    (result,) = rewards.results([await rewards.score(example, caption, "0/0/u/0")])
    names = ["plugins_of_a_user:Brevity", "plugins_of_a_user:Constant", "length"]
    assert result.components == dict(zip(names, [0.5, 1.0, 1.0], strict=True))
    assert result.score == pytest.approx(0.5 * 0.5 + 2.0 + 0.2)
    await rewards.aclose()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "rewards.0.kind=no_such_module.x:Y",
            r"rewards\.0: no_such_module.x:Y: there is no module no_such_module;",
        ),
        ("rewards.0.kind=plugins_of_a_user:None_such", "plugins_of_a_user has no None_such$"),
        (
            "rewards.0.kind=plugins_of_a_user:number",
            "plugins_of_a_user:number: is no reward, a class with async",
        ),
        ("rewards.0.kind=plugins_of_a_user:Synchronous", "is no reward, a class with async methods score and aclose"),
        ("rewards.0.kind=plugins_of_a_user:OtherConfig", "its Config is no subclass of .*RewardConfig$"),
        ("rewards.0.kind=broken_plugin:Reward", r"broken_plugin cannot be imported \(ZeroDivisionError: division by"),
        ("rewards.0.kind='a b:c'", "'a b:c' is no import path; write package.module:name$"),
        ("rewards.0.most=many", r"rewards\.0: plugins_of_a_user:Brevity: most: .* valid integer.* \(got 'many'\)$"),
        ("rewards.0.least=1", r"plugins_of_a_user:Brevity: least: .*; no such key$"),
        ("rewards.1.most=1", r"rewards\.1: plugins_of_a_user:Constant: most: .*; no such key$"),
        ("algorithm.loss=plugins_of_a_user:number", r"algorithm\.loss: plugins_of_a_user:number: is no loss, a capipe"),
        ("algorithm.loss=plugins_of_a_user:none", r"algorithm\.loss: plugins_of_a_user:none: .* has no none$"),
        (
            "algorithm.loss=magic",
            r"algorithm\.loss: there is no loss 'magic'; take grpo, .* or package\.module:name$",
        ),
    ],
)
def test_what_is_no_reward_or_loss_is_refused_in_one_line(recipe: Path, override: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        load_recipe(recipe, [override])
    assert "\n" not in str(refused.value) and str(refused.value).startswith(f"{recipe}: ")


async def test_a_reward_that_cannot_be_built_is_refused_in_one_line(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["rewards.0.most=0"])
    with pytest.raises(BadInput, match=r"rewards: .*:Brevity cannot be built \(ValueError: most is zero\)") as refused:
        await build_reward_manager(loaded.rewards, lambda ids: "")
    assert "\n" not in str(refused.value)


def test_options_and_code_are_what_a_run_is(recipe: Path) -> None:
    first = load_recipe(recipe).semantic()
    assert first["rewards"][0] == {"kind": "plugins_of_a_user:Brevity", "weight": 0.5, "normalise": False, "most": 4}
    assert set(first["code"]) == {"plugins_of_a_user:Brevity", "plugins_of_a_user:Constant"}
    assert load_recipe(recipe, ["rewards.0.most=5"]).semantic() != first
    assert "plugins_of_a_user:mean" in load_recipe(recipe, ["algorithm.loss=plugins_of_a_user:mean"]).semantic()["code"]
    assert "code" not in load_recipe(recipe, ["rewards=[{kind: length}]"]).semantic()
    (recipe.parent / "plugins_of_a_user.py").write_text(MODULE + "\nchanged = True\n")
    assert load_recipe(recipe).semantic()["code"] != first["code"]


def test_losses_by_name_and_by_path(recipe: Path) -> None:
    assert find_loss("grpo") is LOSSES["grpo"]
    assert find_loss("plugins_of_a_user:mean").aggregation == "token"
