"""Packed captions of Qwen3.5 get the log-probabilities and the gradients of each caption by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from capipe.trainer.build import freeze, parts_of
from capipe.trainer.policy.batch import Group, pack
from capipe.trainer.policy.decoder import DecoderPolicy, reference_logps
from capipe.trainer.policy.fsdp import layers_of
from capipe.trainer.policy.lora import LoRAConfig, adapter_weights, insert_adapter
from capipe.trainer.policy.packing.recurrent import CHUNK
from capipe.trainer.recipe_sections import TrainedConfig

from ....models.hybrids import random_hybrid
from ...policies import IDS, IMAGE, VIDEO, VOCABULARY, completion, groups, prompt, random_model

BANNED = (IMAGE, VIDEO)


@pytest.fixture
def double_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' delta rule in float64, where it casts to float32: only rounding may differ, and it shows there."""

    class Double:
        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(modeling_qwen3_5, "torch", Double())


def ragged(policy: DecoderPolicy) -> list[Group]:
    """Images of two sizes; prompts shorter than the convolution; captions of one token, and around a chunk's edge."""
    around = [completion(length, 40 + length) for length in (CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 2, 2)]
    made = [
        *groups(policy, "qwen3.5"),
        Group("e", "e", prompt(policy, None, CHUNK + 6, 7), around),
        Group("f", "f", prompt(policy, None, 2, 8), [completion(1, 61), completion(9, 69)]),
    ]
    weight = next(policy.parameters())
    for group in made:
        if group.prompt.image is not None:
            object.__setattr__(group.prompt.image, "patches", group.prompt.image.patches.to(weight))
    return made


def both_ways(policy: DecoderPolicy, checkpointing: bool = False) -> tuple[float, float]:
    """Largest difference of log-probabilities, in nats, and relative difference of gradients, packed and plain."""
    made = ragged(policy)
    plain = torch.cat([reference_logps(policy, g.prompt, c.token_ids) for g in made for c in g.completions])
    torch.manual_seed(0)
    weight = torch.randn(len(plain)).to(plain)
    (plain * weight).sum().backward()
    expected = gradients(policy)
    policy.zero_grad()
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
    fast = policy(pack(made)).logp
    (fast * weight).sum().backward()
    assert fast.std() > 0.5  # tokens differ, so that agreeing means something
    return (fast - plain).abs().max().item(), float((gradients(policy) - expected).norm() / expected.norm())


def gradients(policy: DecoderPolicy) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_equal_the_plain_way(checkpointing: bool, double_deltas: None) -> None:
    policy = DecoderPolicy(random_model("qwen3.5"), BANNED, temperature=0.8)
    logps, grads = both_ways(policy, checkpointing)
    assert logps < 1e-5 and grads < 1e-6
    learnt = dict(policy.base.language_model.layers[0].linear_attn.named_parameters())
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in learnt.values())


@pytest.mark.parametrize("moe", [False, True])
def test_single_precision_is_within_the_bound(moe: bool) -> None:
    logps, grads = both_ways(DecoderPolicy(random_hybrid(IDS, moe=moe, vocab_size=VOCABULARY), BANNED))
    assert logps < 1e-4 and grads < 1e-4


def test_a_repeated_run_has_the_same_gradients() -> None:
    policy = DecoderPolicy(random_model("qwen3.5"), BANNED)
    batch, found = pack(ragged(policy)), []
    for _ in range(2):
        policy.zero_grad()
        policy(batch).logp.sum().backward()
        found.append(gradients(policy))
    assert torch.equal(*found)


def test_parts_and_layers_are_those_of_the_family() -> None:
    model = random_model("qwen3.5")
    parts = parts_of(model)
    assert all(parts.values()) and sum(map(len, parts.values())) == len(list(model.parameters()))
    assert len(parts["projector"]) == len(list(model.model.visual.merger.parameters()))
    assert len(layers_of(DecoderPolicy(model, BANNED))) == 2 + 3


def test_adapters_learn_in_recurrent_layers() -> None:
    pytest.importorskip("peft")
    config = LoRAConfig(rank=3, targets=("in_proj_qkv", "in_proj_a", "out_proj", "q_proj", "down_proj"))
    model = random_model("qwen3.5")
    freeze(model, TrainedConfig(lora=config))
    insert_adapter(model, config, "start", 0)
    policy = DecoderPolicy(model, BANNED)
    torch.manual_seed(7)
    for weight in adapter_weights(policy).values():
        weight.data.normal_(std=0.2)
    logps, grads = both_ways(policy)
    assert logps < 1e-4 and grads < 1e-4
    assert sum("linear_attn" in name for name in adapter_weights(policy)) == 2 * 3 * 2
