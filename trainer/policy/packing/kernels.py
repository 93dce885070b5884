"""Attention with its log-sum-exp, and its gradients from a merged one: the parts from which tree attention is made.

A softmax over two sets of keys is the sum of the softmaxes over each, weighted by their log-sum-exp. The backward pass
of flash attention (arXiv 2205.14135, algorithm 4) reads nothing of the forward pass but output and log-sum-exp, so with
those of the whole it gives each set's share of the gradients. No key is copied to the sequences that share it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class States(NamedTuple):
    """``query``: (sequences, heads, queries, width); ``key``, ``value``: (sequences, key heads, keys, width).

    Heads are a multiple of key heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor


class Attended(NamedTuple):
    """``out``: (sequences, heads, queries, width); ``lse``: log-sum-exp of scores, (sequences, heads, queries).

    The whole is at least float32: parts are merged before they are rounded.
    """

    out: Tensor
    lse: Tensor


class Kernel(Protocol):
    """Attention of queries over keys. ``causal``: as many keys as queries, and none later than its query."""

    def forward(self, states: States, causal: bool, scale: float) -> Attended: ...

    def backward(self, grad: Tensor, states: States, whole: Attended, causal: bool, scale: float) -> States:
        """Gradients of the states from ``grad``, that of the output; ``whole``: over all sets of keys."""
        ...


class MathKernel:
    """Matrix products and a softmax, for any device and type; the slow twin of the others."""

    def forward(self, states: States, causal: bool, scale: float) -> Attended:
        scores = _scores(states, causal, scale)
        lse = scores.logsumexp(dim=-1)
        out = (scores - lse[..., None]).exp() @ states.value[:, :, None].to(scores.dtype)
        return Attended(out.flatten(1, 2), lse.flatten(1, 2))

    def backward(self, grad: Tensor, states: States, whole: Attended, causal: bool, scale: float) -> States:
        q, g, out, lse = (_grouped(heads, states.key) for heads in (states.query, grad, *whole))
        chances = (_scores(states, causal, scale) - lse[..., None]).exp()
        g, out = g.to(chances.dtype), out.to(chances.dtype)
        spread = g @ states.value[:, :, None].to(chances.dtype).transpose(-1, -2) - (g * out).sum(-1, keepdim=True)
        of_scores = chances * spread * scale
        of_query = (of_scores @ states.key[:, :, None].to(chances.dtype)).flatten(1, 2)
        of_key = (of_scores.transpose(-1, -2) @ q.to(chances.dtype)).sum(dim=2)
        of_value = (chances.transpose(-1, -2) @ g).sum(dim=2)
        return States(of_query, of_key, of_value)


def _scores(states: States, causal: bool, scale: float) -> Tensor:
    """(sequences, key heads, heads per key head, queries, keys), at least float32."""
    exact = torch.promote_types(states.query.dtype, torch.float32)
    query, key = _grouped(states.query, states.key).to(exact), states.key[:, :, None].to(exact)
    scores = query @ key.transpose(-1, -2) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def _grouped(states: Tensor, key: Tensor) -> Tensor:
    """(sequences, heads, ...) -> (sequences, key heads, heads per key head, ...)."""
    grouped: Tensor = states.unflatten(1, (key.shape[1], -1))
    return grouped


class FlashCPUKernel:
    """PyTorch's flash attention for CPUs, which reads grouped heads as they are."""

    def forward(self, states: States, causal: bool, scale: float) -> Attended:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return Attended(*attend(*states, 0.0, causal, scale=scale))

    def backward(self, grad: Tensor, states: States, whole: Attended, causal: bool, scale: float) -> States:
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        out = whole.out.to(grad.dtype)
        return States(*gradients(grad, *states, out, whole.lse, 0.0, causal, scale=scale))
