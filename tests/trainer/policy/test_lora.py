"""An adapter learns alone, begins as nothing, is switched off for the reference, and is merged into what is saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from capipe.errors import BadInput
from capipe.trainer.build import build_policy, freeze, write_policy
from capipe.trainer.policy.batch import RewardResult, pack
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.policy.lora import (
    LoRAConfig,
    adapter_off,
    adapter_weights,
    insert_adapter,
    load_adapter,
    merged_weights,
    save_adapter,
)
from capipe.trainer.recipe import Recipe
from capipe.trainer.recipe_sections import TrainedConfig
from capipe.trainer.update import UpdateConfig, Updater

from ..policies import IMAGE, groups, random_model

pytest.importorskip("peft")

FAMILIES = ("qwen2.5", "qwen3")
CONFIG = LoRAConfig(rank=3, alpha=6.0)


def adapted(family: str = "qwen2.5", config: LoRAConfig = CONFIG, seed: int = 0) -> DecoderPolicy:
    model = random_model(family).eval()
    freeze(model, TrainedConfig(lora=config))
    insert_adapter(model, config, "start", seed)
    return DecoderPolicy(model, [IMAGE])


def shake(policy: DecoderPolicy) -> None:
    """As if something had been learnt: the second matrices begin as 0."""
    torch.manual_seed(7)
    for weight in adapter_weights(policy).values():
        weight.data.normal_(std=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_language_model_gets_one_and_only_it_learns(family: str) -> None:
    policy = adapted(family)
    learning = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert len(learning) == 2 * 7 * 2  # two matrices for each of seven targets in two layers
    assert all("language_model.layers" in name and ".lora_" in name for name in learning)
    made = groups(policy, family)
    batch = pack(made)
    expected = DecoderPolicy(random_model(family), [IMAGE])(batch).logp
    assert torch.equal(policy(batch).logp, expected)  # it begins as nothing
    shake(policy)
    assert (policy(batch).logp - expected).abs().max() > 0.1
    with adapter_off(policy):
        assert torch.equal(policy(batch).logp, expected)
    assert [name for name, weight in policy.named_parameters() if weight.requires_grad] == learning


def test_a_seed_gives_the_first_weights_and_leaves_the_process_s_own_random_numbers() -> None:
    def first(seed: int) -> torch.Tensor:
        return torch.cat([weight.flatten() for weight in adapter_weights(adapted(seed=seed)).values()])

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))
    model = random_model("qwen2.5")
    before = torch.random.get_rng_state()
    insert_adapter(model, CONFIG, "start", 5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_reference_without_the_adapter_leaves_the_gradients_alone() -> None:
    """The switch is used between a pass and its way back."""
    config = UpdateConfig(kl=0.5, max_norm=1e9)
    moved = []
    for copied in (False, True):
        policy = adapted()
        frozen = DecoderPolicy(random_model("qwen2.5").requires_grad_(False), [IMAGE])
        shake(policy)

        def switched(batch: Any, policy: DecoderPolicy = policy) -> torch.Tensor:
            with torch.no_grad(), adapter_off(policy):
                return policy(batch).logp

        reference = (lambda batch, frozen=frozen: frozen(batch).logp) if copied else switched
        optimizer = torch.optim.SGD([weight for weight in policy.parameters() if weight.requires_grad], lr=0.01)
        made = groups(policy, "qwen2.5")[:2]
        for group in made:
            group.rewards = [RewardResult(float(number)) for number in range(len(group.completions))]
        before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
        report = Updater(policy, optimizer, config, reference).update(made)
        assert report.kl > 0.01 and report.skipped is None
        after = dict(policy.named_parameters())
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if ".lora_" in name}
        moved.append(torch.cat([(after[name] - before[name]).flatten() for name in sorted(changed)]))
    assert torch.allclose(*moved, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_is_the_plain_model_that_says_the_same(family: str) -> None:
    policy = adapted(family)
    shake(policy)
    batch = pack(groups(policy, family))
    expected = policy(batch).logp
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    plain = random_model(family, seed=9)
    plain.load_state_dict(dict(merged_weights(policy.model)), strict=True)
    assert (DecoderPolicy(plain, [IMAGE])(batch).logp - expected).abs().max() < 1e-6
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())


def test_what_is_saved_comes_back_to_us_and_to_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    policy = adapted()
    shake(policy)
    save_adapter(policy.model, tmp_path)
    batch = pack(groups(policy, "qwen2.5"))
    expected = policy(batch).logp
    again = adapted(seed=3)
    load_adapter(again.model, tmp_path)
    assert torch.equal(again(batch).logp, expected)
    theirs = PeftModel.from_pretrained(random_model("qwen2.5"), str(tmp_path))
    assert torch.equal(DecoderPolicy(theirs.get_base_model(), [IMAGE])(batch).logp, expected)
    with pytest.raises(BadInput, match="another adapter"):
        load_adapter(adapted(config=LoRAConfig(rank=4)).model, tmp_path)


def test_dropout_is_on_in_training_alone() -> None:
    policy = adapted(config=LoRAConfig(rank=3, dropout=0.5))
    shake(policy)
    batch = pack(groups(policy, "qwen2.5"))
    assert torch.equal(policy(batch).logp, policy(batch).logp)
    policy.train()
    assert not torch.equal(policy(batch).logp, policy(batch).logp)


def test_gradient_checkpointing_changes_nothing() -> None:
    """Its first layer reads embeddings that do not learn, which must not cut the adapter off."""
    found = []
    for checkpointing in (False, True):
        policy = adapted()
        shake(policy)
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
            policy.train()
        policy(pack(groups(policy, "qwen2.5"))).logp.sum().backward()
        found.append([weight.grad for weight in adapter_weights(policy).values()])
    assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(*found, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in found[1])


def test_targets_that_the_language_model_lacks_are_named() -> None:
    with pytest.raises(BadInput, match=r"no qkv, q_porj; it has down_proj, gate_proj, k_proj"):
        adapted(config=LoRAConfig(targets=("qkv", "q_porj", "v_proj")))


def test_without_peft_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInput, match=r"pip install 'capipe\[lora\]'"):
        adapted()


def test_a_checkpoint_is_a_plain_folder_with_the_adapter_beside_it(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "model": "tiny/captioner",
            "data": {"shards": "", "questions": ""},
            "rewards": [{"kind": "length"}],
            "trained": {"lora": {"rank": 2}},
            "algorithm": {"kl": 0.1},
        }
    )
    parts = build_policy(recipe)
    assert "llm frozen (" in parts.learning and "adapter of rank 2 learns (" in parts.learning
    shake(parts.policy)
    write_policy(parts, tmp_path / "made", {})
    assert {path.name for path in (tmp_path / "made/adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "made", dtype="float32")
    assert not any("lora" in name for name, _ in plain.named_parameters())
    merged = dict(merged_weights(parts.policy.model))
    assert all(torch.equal(weight, merged[name]) for name, weight in plain.state_dict().items())
    again = build_policy(recipe, tmp_path / "made")
    mine, theirs = parts.policy.state_dict(), again.policy.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for made in (parts, again):
        made.pictures.close()
