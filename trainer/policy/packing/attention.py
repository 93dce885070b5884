"""Attention over a flat row of prompts and completions: each completion attends to its prompt and to itself.

Everything except attention (nine tenths of the work of a large model) is computed once for the prompt, with gradients,
in one ordinary forward pass without padding: gradient checkpointing, DDP and FSDP work as usual. Registered with
transformers under :data:`NAME`; without a tree (an engine that samples from the model in training) it is
:func:`....models.engines.hf.folded_attention.folded_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ....errors import BadInput
from ....models.engines.hf.folded_attention import folded_attention
from .flash_varlen import flash_varlen_runs, varlen_tree
from .kernels import Attended, FlashCPUKernel, Kernel, MathKernel, States
from .padded import padded_attention
from .tree import PaddedTree, Run, Span, Tree

NAME = "capipe_tree"
# Arguments of transformers for attention other than full attention, which a tree does not support.
NOT_PACKED = ("sliding_window", "softcap", "s_aux")
FLASH_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree | PaddedTree | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with a tree. ``query``: (rows, heads, columns, head width); ``key``, ``value``: possibly fewer heads.

    Returns (rows, columns, heads, head width), transformers' format, and no weights.
    """
    if tree is None:
        if attention_mask is not None and attention_mask.dtype == torch.long:
            return across_images(query, key, value, attention_mask.flatten().tolist(), scaling), None
        return folded_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    unknown = [name for name in NOT_PACKED if kwargs.get(name) is not None] + ["dropout"] * (dropout > 0)
    if unknown:
        raise BadInput(
            f"{type(module).__name__} attends with {', '.join(unknown)}, which packing captions side by side does not "
            "know; train a model with full attention in all layers"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(tree, PaddedTree):
        return padded_attention(query, key, value, tree, scale), None
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what rotary positions made in float32
    if flash_varlen_runs(value):
        return varlen_tree(query, key, value, tree, scale), None
    with torch.autocast(value.device.type, enabled=False):  # float32 within the kernel stays float32
        out: Tensor = _TreeAttention.apply(query, key, value, tree, scale)
    return out, None


def across_images(query: Tensor, key: Tensor, value: Tensor, columns: list[int], scaling: float | None) -> Tensor:
    """Attention from a flat row to its groups' images: group i's ``columns[i]`` queries to the i-th share of the keys.

    All (1, heads, columns, head width); returns (1, columns, heads, head width).
    """
    states = key.shape[2] // len(columns)
    parts = zip(query.split(columns, dim=2), key.split(states, dim=2), value.split(states, dim=2), strict=True)
    seen = [functional.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in parts]
    return torch.cat(seen, dim=2).transpose(1, 2)


def no_mask(device: torch.device) -> Tensor:
    """A mask that transformers passes on as it is, instead of building one of columns x columns; never read."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def image_columns(tree: Tree, device: torch.device) -> Tensor:
    """Columns of each group, in the form of a mask, which transformers hands to attention across images."""
    return torch.tensor([span.end - span.start for span in tree.spans], device=device).view(1, 1, 1, -1)


def kernel_for(states: Tensor) -> Kernel:
    """The kernel for a device and type."""
    return FlashCPUKernel() if states.device.type == "cpu" and states.dtype in FLASH_TYPES else MathKernel()


class _TreeAttention(torch.autograd.Function):
    """Tree attention by slices of the flat row: prompts and branches causally, then branches over their prompt."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float) -> Tensor:
        kernel, states = kernel_for(value), States(query, key, value)
        exact = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty(query.transpose(1, 2).shape, dtype=exact)
        whole = Attended(out.transpose(1, 2), query.new_empty(query.shape[:3], dtype=exact))
        for run in tree.runs:
            own = kernel.forward(States(*(_of(part, run) for part in states)), True, scale)
            for part, found in zip(whole, own, strict=True):
                _of(part, run).copy_(found)
        for span in tree.branching:
            merge(_after(whole, span), kernel.forward(_across(states, span), False, scale))
        ctx.save_for_backward(*states, out, whole.lse)
        ctx.tree, ctx.scale = tree, scale
        return out.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        kernel, states, whole = kernel_for(value), States(query, key, value), Attended(out.transpose(1, 2), lse)
        grad = grads[0].transpose(1, 2)
        sums = States(*(torch.empty_like(part, dtype=lse.dtype) for part in states))
        for run in ctx.tree.runs:
            own = States(*(_of(part, run) for part in states)), Attended(*(_of(part, run) for part in whole))
            for part, found in zip(sums, kernel.backward(_of(grad, run), *own, True, ctx.scale), strict=True):
                _of(part, run).copy_(found)
        for span in ctx.tree.branching:
            across = _across(states, span), _after(whole, span)
            more = kernel.backward(grad[:, :, _branches(span)], *across, False, ctx.scale)
            for part, found in zip(_across(sums, span), more, strict=True):
                part += found
        return *(total.to(part.dtype) for total, part in zip(sums, states, strict=True)), None, None


def _branches(span: Span) -> slice:
    return slice(span.branch_start, span.end)


def _across(states: States, span: Span) -> States:
    """Views of a group's branches as queries, and of its prompt as keys and values."""
    prompt = slice(span.start, span.branch_start)
    return States(states.query[:, :, _branches(span)], states.key[:, :, prompt], states.value[:, :, prompt])


def _after(whole: Attended, span: Span) -> Attended:
    """Views of what a group's branches attended to."""
    return Attended(whole.out[:, :, _branches(span)], whole.lse[:, :, _branches(span)])


def merge(own: Attended, other: Attended) -> None:
    """Make ``own``, in place, the attention over its keys and those of ``other`` together."""
    total = torch.logaddexp(own.lse, other.lse)
    own.out.mul_((own.lse - total).exp_()[..., None]).add_(other.out * (other.lse - total).exp_()[..., None])
    own.lse.copy_(total)


def _of(states: Tensor, run: Run) -> Tensor:
    """A run's columns of (1, heads, columns, ...) as a view (sequences, heads, columns of a sequence, ...)."""
    own: Tensor = states[0, :, run.start : run.end].unflatten(1, (run.count, run.length))
    return own.transpose(0, 1)


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
