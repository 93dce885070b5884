"""Heads folded into queries attend as SDPA does, and only models that ask for their attention by name are changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from capipe.models.engines.hf.folded_attention import NAME, fold_heads, folded_attention


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_folded_heads_attend_as_sdpa_does(columns: int, masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(5, 6, columns, 8), torch.randn(5, 2, 9, 8), torch.randn(5, 2, 9, 8)
    mask = torch.rand(5, 1, columns, 9) > 0.3 if masked else None
    if mask is not None:
        mask[..., 0] = True
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=False)
    found, weights = folded_attention(module, query, key, value, mask, scaling=0.5)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.5)
    assert weights is None and found.shape == (5, columns, 6, 8)
    torch.testing.assert_close(found, expected)


def test_models_that_choose_their_attention_otherwise_are_left_alone() -> None:
    config = Qwen2Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    config.num_key_value_heads = 1
    model: Any = Qwen2ForCausalLM(config)
    fold_heads(model)
    assert model.config._attn_implementation == NAME
    other: Any = Qwen2ForCausalLM(config)
    other.config._attn_implementation = "eager"
    fold_heads(other)
    assert other.config._attn_implementation == "eager"
    inner = SimpleNamespace(_attn_implementation="sdpa")  # of a class that does not look attention up by its name
    fold_heads(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: inner)))
    assert inner._attn_implementation == "sdpa"
