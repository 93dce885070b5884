"""Tree attention on CUDA: two calls of PyTorch's flash kernels for sequences of unequal length, whatever the layout.

The first attends causally within every prompt and branch, the second from all branches to their prompts; the parts are
merged by log-sum-exp as in :mod:`.attention`. The kernels read grouped heads without repeating keys. Written
against torch 2.11 to 2.13. Not run on a GPU yet; layout, merging and gradients are tested with plain attention in the
kernels' place.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .tree import Tree


def flash_varlen_runs(states: Tensor) -> bool:
    """Whether the flash kernels take these states: half precision on a GPU of compute capability 8.0 or more."""
    return (
        states.device.type == "cuda"
        and states.dtype in (torch.float16, torch.bfloat16)
        and states.shape[-1] <= 256
        and torch.cuda.get_device_capability(states.device) >= (8, 0)
    )


def varlen_tree(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float) -> Tensor:
    """``query``: (1, heads, columns, width), ``key``, ``value``: possibly fewer heads; (1, columns, heads, width)."""
    flat = (states[0].transpose(0, 1) for states in (query, key, value))
    out: Tensor = _VarlenTree.apply(*flat, tree, scale)
    return out[None]


@dataclass(frozen=True)
class Starts:
    """First places of sequences of queries and of keys, with the end, int32; and the longest of each."""

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]


def starts_of(queries: list[int], keys: list[int], device: torch.device) -> Starts:
    longest = [max(end - start for start, end in pairwise(places)) for places in (queries, keys)]
    first, second = (torch.tensor(places, dtype=torch.int32, device=device) for places in (queries, keys))
    return Starts(first, second, (longest[0], longest[1]))


def forward_varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Starts, causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Output (columns, heads, width), log-sum-exp (heads, columns), and the kernel's random state."""
    out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        *(query, key, value, starts.queries, starts.keys, *starts.longest, 0.0, causal, False), scale=scale
    )
    return out, lse, (state, unused)


def backward_varlen(
    grad: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    whole: tuple[Tensor, Tensor],
    starts: Starts,
    kept: tuple[Any, ...],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``whole``: output and log-sum-exp over all sets of keys."""
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        *(grad, *states, *whole, starts.queries, starts.keys, *starts.longest, 0.0, causal, *kept), scale=scale
    )
    return grads


class _VarlenTree(torch.autograd.Function):
    """All (columns, heads, width). Columns of branches and of their prompts are gathered once each, never repeated."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float) -> Tensor:
        own = starts_of(tree.own_starts, tree.own_starts, query.device)
        out, lse, kept = forward_varlen(query, key, value, own, True, scale)
        ctx.kept = [kept]
        if tree.branching:
            after, before = tree.after.to(query.device), tree.before.to(query.device)
            shared = starts_of(tree.shared_starts[0], tree.shared_starts[1], query.device)
            more, more_lse, kept = forward_varlen(query[after], key[before], value[before], shared, False, scale)
            ctx.kept.append(kept)
            old, old_lse = out[after], lse[:, after]
            total = torch.logaddexp(old_lse, more_lse)
            share, more_share = ((size - total).exp().T[..., None] for size in (old_lse, more_lse))
            out[after], lse[:, after] = (old * share + more * more_share).to(out.dtype), total
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad, tree, scale = grads[0].contiguous(), ctx.tree, ctx.scale
        own = starts_of(tree.own_starts, tree.own_starts, query.device)
        found = backward_varlen(grad, (query, key, value), (out, lse), own, ctx.kept[0], True, scale)
        if tree.branching:
            after, before = tree.after.to(query.device), tree.before.to(query.device)
            states, whole = (query[after], key[before], value[before]), (out[after], lse[:, after].contiguous())
            shared = starts_of(tree.shared_starts[0], tree.shared_starts[1], query.device)
            more = backward_varlen(grad[after], states, whole, shared, ctx.kept[1], False, scale)
            for total, part, places in zip(found, more, (after, before, before), strict=True):
                total.index_add_(0, places, part)
        return *found, None, None
