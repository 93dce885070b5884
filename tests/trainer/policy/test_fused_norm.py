"""Fused norms equal the models' own, forwards and backwards, and take the place of no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.policy.fused_norm import FusedNorm, fuse_norms

from ..policies import random_model


def with_gradients(norm: Any, hidden: Tensor) -> list[Tensor]:
    out = norm(hidden)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, (hidden, norm.weight), torch.randn_like(out))]


@pytest.mark.parametrize("kind", [Qwen2_5_VLRMSNorm, Qwen3VLTextRMSNorm])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_fused_norms_equal_plain_ones(kind: Any, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = kind(16, eps=1e-6).to(dtype)
    norm.weight.data.uniform_(0.5, 2)
    hidden = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
    plain = with_gradients(norm, hidden)
    assert fuse_norms(nn.ModuleList([norm])) == 1
    for one, other in zip(with_gradients(norm, hidden), plain, strict=True):
        assert one.dtype == other.dtype and (one - other).abs().max() < tolerance  # the model's own are in float32
    assert fuse_norms(nn.ModuleList([norm])) == 0  # once is enough


def test_half_precision_is_the_models_own() -> None:
    norm = Qwen2_5_VLRMSNorm(16)
    hidden = torch.randn(3, 16, dtype=torch.bfloat16)
    plain = norm(hidden)
    fuse_norms(nn.ModuleList([norm]))
    assert torch.equal(norm(hidden), plain)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class OtherRMSNorm(Qwen2_5_VLRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return (1 + self.weight) * super().forward(hidden_states)

    assert fuse_norms(nn.ModuleList([OtherRMSNorm(16), nn.LayerNorm(16)])) == 0


@pytest.mark.parametrize(("family", "norms"), [("qwen2.5", 2 * 2 + 1 + 2 * 2 + 1), ("qwen3", 2 * 4 + 1)])
def test_a_policy_has_fused_norms(family: str, norms: int) -> None:
    policy = DecoderPolicy(random_model(family))
    found = [module for module in policy.modules() if isinstance(module.forward, FusedNorm)]
    assert len(found) == norms
