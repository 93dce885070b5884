"""Slow twin of a flat row's attention: a padded row ``[prompt | completion 1 | ...]`` per group, and dense masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .tree import PaddedTree


def padded_tree(inside: Tensor, branches: int, length: int) -> PaddedTree:
    """``inside``: bool (rows, prefix), false on the left padding of shorter prompts.

    Completions are padded on the right, where the causal mask hides the padding from real tokens.
    """
    rows, prefix = inside.shape
    # A padding position attends to itself, since a softmax over nothing is NaN.
    itself = torch.eye(prefix, dtype=torch.bool, device=inside.device)
    prefix_mask = (inside[:, None, :] & _causal(prefix, inside) | itself)[:, None]
    before = inside[:, None, None, :].expand(rows, branches, length, prefix)
    own = _causal(length, inside).expand(rows, branches, length, length)
    return PaddedTree(prefix, branches, length, prefix_mask, torch.cat([before, own], dim=-1).flatten(0, 1)[:, None])


def _causal(size: int, like: Tensor) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=like.device).tril()


def padded_attention(query: Tensor, key: Tensor, value: Tensor, tree: PaddedTree, scale: float) -> Tensor:
    """As :func:`.attention.tree_attention`; the prompt's keys are copied to every branch."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    (own_q, q), (own_k, k), (own_v, v) = (_split(states, tree) for states in (query, key, value))
    of_prefix = functional.scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=tree.prefix_mask, scale=scale)
    if not tree.length:
        return of_prefix.transpose(1, 2).contiguous()
    k, v = (torch.cat([_to_branches(old, tree), new], dim=2) for old, new in ((own_k, k), (own_v, v)))
    of_branches = functional.scaled_dot_product_attention(q, k, v, attn_mask=tree.branch_mask, scale=scale)
    back = of_branches.unflatten(0, (-1, tree.branches)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return torch.cat([of_prefix.transpose(1, 2), back], dim=1)


def _split(states: Tensor, tree: PaddedTree) -> tuple[Tensor, Tensor]:
    """(rows, heads, columns, width) -> (rows, heads, prefix, width), (rows x branches, heads, length, width)."""
    own, rest = states[:, :, : tree.prefix], states[:, :, tree.prefix :]
    branches = rest.unflatten(2, (tree.branches, tree.length)).permute(0, 2, 1, 3, 4)
    return own, branches.flatten(0, 1)


def _to_branches(states: Tensor, tree: PaddedTree) -> Tensor:
    """The prompt's keys or values, repeated for each of its branches."""
    return states[:, None].expand(-1, tree.branches, -1, -1, -1).flatten(0, 1)
