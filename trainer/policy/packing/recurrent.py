"""Gated delta layers over packed prompts and completions: each completion continues the state at its prompt's end.

The counterpart of :mod:`.attention` for Qwen3.5's recurrent layers (Yang et al., Gated Delta Networks, 2024).
Projections are computed on the flat row. The convolution and the recurrence run over prompts first, then over
completions from their prompt's state and its last columns, with gradients through both: prompts are padded on the left,
where a state of zeros reads columns of zeros as nothing, completions on the right, after everything that counts.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .tree import Tree

LAYERS = ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")  # transformers' classes
CHUNK = 64  # tokens that the delta rule computes at once; what a shorter piece lacks is padded there


def follow_trees(model: nn.Module) -> None:
    """Make the gated delta layers of ``model`` compute packed rows; without a tree they stay transformers' own."""
    for layer in model.modules():
        if type(layer).__name__ in LAYERS:
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, hidden_states: Tensor, *arguments: Any, tree: Tree | None = None, **kwargs: Any) -> Tensor:
    if tree is None:
        whole: Tensor = type(layer).forward(layer, hidden_states, *arguments, **kwargs)
        return whole
    return recurrent_tree(layer, hidden_states, tree)


def recurrent_tree(layer: Any, hidden: Tensor, tree: Tree) -> Tensor:
    """Output of a gated delta layer, (1, columns, width) as its input ``hidden``, for the flat row of ``tree``."""
    plan = _plan(tree, hidden.device)
    gate = layer.in_proj_z(hidden).unflatten(-1, (-1, layer.head_v_dim))
    decay = -layer.A_log.float().exp() * functional.softplus(layer.in_proj_a(hidden).float() + layer.dt_bias)
    row = _Columns(layer.in_proj_qkv(hidden)[0], decay[0], layer.in_proj_b(hidden).sigmoid()[0])
    results: list[Tensor] = []
    ends: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in plan.prompts:
        values, windows, states = _recur(layer, row, batch, None)
        results.append(values)
        ends.update(zip(batch.groups, zip(windows.unbind(), states.unbind(), strict=True), strict=True))
    for batch in plan.branches:
        results.append(_recur(layer, row, batch, _begin(ends, batch.groups))[0])
    values = torch.cat([result.flatten(0, 1) for result in results]).index_select(0, plan.order)
    normed: Tensor = layer.norm(values.flatten(0, 1), gate.flatten(0, 2))
    output: Tensor = layer.out_proj(normed.reshape(*hidden.shape[:2], -1))
    return output


@dataclass(frozen=True)
class _Columns:
    """A flat row's inputs of the recurrence: queries, keys and values before the convolution, (columns, width); the
    logarithm of the state's decay and the strength of its update, (columns, heads)."""

    mixed: Tensor
    decay: Tensor
    beta: Tensor


@dataclass(frozen=True)
class _Piece:
    """``length`` columns of the flat row from ``start``: the prompt of a group, or one of its completions."""

    group: int
    start: int
    length: int


@dataclass(frozen=True)
class _Padded:
    """Pieces with the same number of chunks, as rows of one batch; ``width``: of the longest.

    ``groups``: each row's group; ``columns``, ``cells``: (tokens,), for each column of the pieces its index in the
    flat row and in the flattened batch (rows x width).
    """

    groups: tuple[int, ...]
    width: int
    columns: Tensor
    cells: Tensor

    def spread(self, states: Tensor) -> Tensor:
        """(columns of the flat row, width) -> (rows, width of the batch, width), zeros as padding."""
        rows = states.new_zeros(len(self.groups) * self.width, states.shape[1])
        filled = rows.index_copy(0, self.cells, states.index_select(0, self.columns))
        return filled.view(-1, self.width, states.shape[1])


@dataclass(frozen=True)
class _Plan:
    """``order``: (columns,), where the flat row's columns are in the flattened batches, one after another."""

    prompts: list[_Padded]
    branches: list[_Padded]
    order: Tensor


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # or a later pass with gradients could not use what is kept
def _plan(tree: Tree, device: torch.device) -> _Plan:
    """How the layers of a forward pass batch the pieces of its row."""
    prompts, branches = [], []
    for group, span in enumerate(tree.spans):
        prompts.append(_Piece(group, span.start, span.prompt))
        starts = zip(span.branch_starts(), span.branches, strict=True)
        branches += [_Piece(group, start, length) for start, length in starts if length]
    before, after = _batches(prompts, device, left=True), _batches(branches, device, left=False)
    columns, cells, size = [], [], 0
    for batch in (*before, *after):
        columns.append(batch.columns)
        cells.append(batch.cells + size)
        size += len(batch.groups) * batch.width
    order = torch.empty(tree.columns, dtype=torch.long, device=device)
    order[torch.cat(columns)] = torch.cat(cells)
    return _Plan(before, after, order)


def _batches(pieces: Sequence[_Piece], device: torch.device, left: bool) -> list[_Padded]:
    """Batches of pieces, one per number of chunks, padded on the left or on the right."""
    by_chunks = defaultdict(list)
    for piece in pieces:
        by_chunks[-(-piece.length // CHUNK)].append(piece)
    batches = []
    for _, rows in sorted(by_chunks.items()):
        width = max(piece.length for piece in rows)
        firsts = [row * width + (width - piece.length if left else 0) for row, piece in enumerate(rows)]
        columns = torch.cat([torch.arange(piece.start, piece.start + piece.length) for piece in rows])
        cells = torch.cat([torch.arange(at, at + piece.length) for at, piece in zip(firsts, rows, strict=True)])
        groups = tuple(piece.group for piece in rows)
        batches.append(_Padded(groups, width, columns.to(device), cells.to(device)))
    return batches


def _begin(ends: dict[int, tuple[Tensor, Tensor]], groups: Sequence[int]) -> list[Tensor]:
    """Convolution windows and states that rows of these groups begin with.

    Expanded, not indexed: the gradients of a prompt's end are then summed in a fixed order.
    """
    rows = [(ends[group], len(list(members))) for group, members in groupby(groups)]
    return [torch.cat([end[which].expand(count, *end[which].shape) for end, count in rows]) for which in (0, 1)]


def _recur(layer: Any, row: _Columns, batch: _Padded, begin: Sequence[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution and the gated delta rule over a batch, from ``begin``, or from nothing.

    Returns values (rows, width, heads, value width) and what a row that is full to its end leaves behind: its last
    columns before the convolution, (rows, kernel - 1, width), and the state, (rows, heads, key width, value width).
    """
    library = sys.modules[type(layer).__module__]  # its functions are kernels where the packages are installed
    mixed, before = batch.spread(row.mixed), layer.conv_kernel_size - 1
    window, state = (mixed.new_zeros(len(mixed), before, mixed.shape[2]), None) if begin is None else begin
    mixed = torch.cat([window, mixed], dim=1)
    convolved = library.causal_conv1d_fn(
        mixed.transpose(1, 2), layer.conv1d.weight.squeeze(1), layer.conv1d.bias, activation=layer.activation
    )[:, :, before:].transpose(1, 2)
    query, key, value = convolved.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    query, key = (
        states.unflatten(-1, (-1, layer.head_k_dim)).repeat_interleave(layer.num_v_heads // layer.num_k_heads, dim=2)
        for states in (query, key)
    )
    values, state = library.torch_chunk_gated_delta_rule(
        query,
        key,
        value.unflatten(-1, (-1, layer.head_v_dim)),
        g=batch.spread(row.decay),
        beta=batch.spread(row.beta),
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return values, mixed[:, mixed.shape[1] - before :], state
