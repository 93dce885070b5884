"""A token by the written-out loop over layers is the token of the model's own forward pass, for each known family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Config,
    Qwen2Model,
    Qwen2VLTextConfig,
    Qwen2VLTextModel,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)

from capipe.models.engines.hf.folded_attention import fold_heads
from capipe.models.engines.hf.kv_cache import new_cache, select_rows
from capipe.models.engines.hf.token_step import AHEAD, TokenStep, steps_by_token

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "initializer_range": 0.4, "max_position_embeddings": 256,
}  # fmt: skip
AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, tuple[Callable[[], Any], int]] = {
    "llama": (lambda: LlamaModel(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)), 1),
    "llama with other positions": (lambda: LlamaModel(LlamaConfig(**SIZES, rope_parameters=YARN)), 1),
    "qwen2": (lambda: Qwen2Model(Qwen2Config(**SIZES)), 1),
    "qwen3": (lambda: Qwen3Model(Qwen3Config(**SIZES, head_dim=16)), 1),
    "qwen2-vl": (lambda: Qwen2VLTextModel(Qwen2VLTextConfig(**SIZES, rope_parameters=AXES)), 3),
    "qwen2.5-vl": (lambda: Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**SIZES, rope_parameters=AXES)), 3),
    "qwen3-vl": (lambda: Qwen3VLTextModel(Qwen3VLTextConfig(**SIZES, head_dim=8, rope_parameters=AXES)), 3),
}


def decoder(family: str) -> tuple[Any, int]:
    torch.manual_seed(0)
    make, axes = FAMILIES[family]
    model = make().double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # biases and norms, which begin as zeros and ones
                weight.add_(torch.randn_like(weight) * 0.3)
    fold_heads(model)
    return model, axes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_token_is_that_of_the_model(family: str, padded: bool) -> None:
    model, axes = decoder(family)
    assert steps_by_token(model)
    lengths = torch.tensor([7, 4, 6] if padded else [7, 7, 7])
    mask = (torch.arange(7) >= 7 - lengths[:, None]).long()
    positions = (torch.arange(7) - (7 - lengths[:, None])).clamp(min=0) + 2
    prompts = torch.randint(0, 40, (3, 7))
    caches = [new_cache(model.config, growing=True) for _ in range(2)]
    for cache in caches:
        forward(model, prompts, mask, positions, axes, cache)
    begin = positions[:, -1] + 1
    step = TokenStep(model, axes, begin)
    for number in range(AHEAD + 5):
        if number in (3, AHEAD + 2):  # rows leave, in other orders
            kept = torch.tensor([2, 0] if number == 3 else [1])
            for cache in caches:
                select_rows(cache, kept)
            step.select(kept)
            mask, begin = mask[kept], begin[kept]
        tokens = torch.randint(0, 40, (len(mask),))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        expected = forward(model, tokens[:, None], mask, (begin + number)[:, None], axes, caches[0])
        found = step(tokens, mask if padded else None, caches[1].layers)
        torch.testing.assert_close(found, expected[:, -1], rtol=1e-9, atol=1e-9)


def forward(model: Any, ids: Any, mask: Any, positions: Any, axes: int, cache: Any) -> torch.Tensor:
    places = positions.expand(axes, -1, -1) if axes > 1 else positions
    states: torch.Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return states


def test_other_models_keep_their_forward_pass() -> None:
    mistral = MistralModel(MistralConfig(**SIZES))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)).transformer
    growing = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    longer = LlamaModel(LlamaConfig(**SIZES, rope_parameters=growing))
    windows = Qwen2Model(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1))
    assert not any(map(steps_by_token, (mistral, gpt2, longer, windows, nn.Linear(2, 2))))


def test_a_model_whose_layers_are_hooked_keeps_its_forward_pass() -> None:
    for path in ("", "layers.1", "layers.1.self_attn"):
        model, _ = decoder("qwen2.5-vl")
        hook = model.get_submodule(path).register_forward_pre_hook(lambda module, inputs: None)
        assert not steps_by_token(model)
        hook.remove()
        assert steps_by_token(model)
    model, _ = decoder("llama")
    model.layers[0].forward = model.layers[0].forward
    assert not steps_by_token(model)
