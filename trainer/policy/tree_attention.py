"""Attention over a prompt and its completions packed into one row: each completion attends to the prompt and itself.

A row is ``[prompt | completion 1 | completion 2 | ...]``, so that everything except attention (nine tenths of the work
of a large model) is computed once for the prompt, with gradients, in one ordinary forward pass: gradient checkpointing,
DDP and FSDP work as usual. Registered with transformers under :data:`NAME`; without a tree (an engine that samples from
the model in training) it is :func:`...models.engines.hf.folded_attention.folded_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ...errors import BadInput
from ...models.engines.hf.folded_attention import folded_attention

NAME = "capipe_tree"
# Arguments of transformers for attention other than full attention; a tree's masks do not support them.
NOT_PACKED = ("sliding_window", "softcap", "s_aux")


@dataclass(frozen=True)
class Tree:
    """Layout of packed rows: ``prefix`` columns of prompt, then ``branches`` times ``length`` columns.

    ``prefix_mask``: bool (rows, 1, prefix, prefix); ``branch_mask``: bool (rows x branches, 1, length, prefix +
    length); true if a query may attend to a key.
    """

    prefix: int
    branches: int
    length: int
    prefix_mask: Tensor
    branch_mask: Tensor


def make_tree(inside: Tensor, branches: int, length: int) -> Tree:
    """Layout and masks of packed rows. ``inside``: bool (rows, prefix), false on the left padding of shorter prompts.

    Completions are padded on the right, where the causal mask hides the padding from real tokens.
    """
    rows, prefix = inside.shape
    # A padding position attends to itself, since a softmax over nothing is NaN.
    itself = torch.eye(prefix, dtype=torch.bool, device=inside.device)
    prefix_mask = (inside[:, None, :] & _causal(prefix, inside) | itself)[:, None]
    before = inside[:, None, None, :].expand(rows, branches, length, prefix)
    own = _causal(length, inside).expand(rows, branches, length, length)
    return Tree(prefix, branches, length, prefix_mask, torch.cat([before, own], dim=-1).flatten(0, 1)[:, None])


def dense_mask(tree: Tree) -> Tensor:
    """The tree as one dense mask, bool (rows, 1, columns, columns), for attention that takes a single mask."""
    rows, p, n = len(tree.prefix_mask), tree.prefix, tree.length
    columns = p + tree.branches * n
    mask = tree.prefix_mask.new_zeros(rows, 1, columns, columns)
    mask[:, :, :p, :p] = tree.prefix_mask
    of_branches = tree.branch_mask.unflatten(0, (rows, tree.branches))
    for branch in range(tree.branches):
        own = slice(p + branch * n, p + (branch + 1) * n)
        mask[:, :, own, :p], mask[:, :, own, own] = of_branches[:, branch].split([p, n], dim=-1)
    return mask


def _causal(size: int, like: Tensor) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=like.device).tril()


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with a tree. ``query``: (rows, heads, columns, head width); ``key``, ``value``: possibly fewer heads.

    Returns (rows, columns, heads, head width), transformers' format, and no weights.
    """
    if tree is not None and (unknown := [name for name in NOT_PACKED if kwargs.get(name) is not None]):
        raise BadInput(
            f"{type(module).__name__} attends with {', '.join(unknown)}, which packing captions side by side does not "
            "know; train a model with full attention in all layers"
        )
    if tree is None:
        return folded_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    (own_q, q), (own_k, k), (own_v, v) = (_split(states, tree) for states in (query, key, value))
    options: Any = {"scale": scaling, "dropout_p": dropout}
    of_prefix = functional.scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=tree.prefix_mask, **options)
    if not tree.length:
        return of_prefix.transpose(1, 2).contiguous(), None
    k, v = (torch.cat([_to_branches(old, tree), new], dim=2) for old, new in ((own_k, k), (own_v, v)))
    of_branches = functional.scaled_dot_product_attention(q, k, v, attn_mask=tree.branch_mask, **options)
    back = of_branches.unflatten(0, (-1, tree.branches)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return torch.cat([of_prefix.transpose(1, 2), back], dim=1), None


def _split(states: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """(rows, heads, columns, width) -> (rows, heads, prefix, width), (rows x branches, heads, length, width)."""
    own, rest = states[:, :, : tree.prefix], states[:, :, tree.prefix :]
    branches = rest.unflatten(2, (tree.branches, tree.length)).permute(0, 2, 1, 3, 4)
    return own, branches.flatten(0, 1)


def _to_branches(states: Tensor, tree: Tree) -> Tensor:
    """The prompt's keys or values, repeated for each of its branches."""
    return states[:, None].expand(-1, tree.branches, -1, -1, -1).flatten(0, 1)


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
