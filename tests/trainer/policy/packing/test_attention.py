"""Tree attention equals attention with one dense mask, in outputs and gradients, for every kernel and layout."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from capipe.trainer.policy.packing import attention, flash_varlen
from capipe.trainer.policy.packing.flash_varlen import Starts, varlen_tree
from capipe.trainer.policy.packing.kernels import Attended, FlashCPUKernel, MathKernel, States
from capipe.trainer.policy.packing.tree import Tree, dense_mask, lay_out

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
TREES = {
    "ragged": lay_out([(5, (7, 3, 0)), (2, (2,)), (9, (4, 4, 4, 6, 1))]),
    "one token each": lay_out([(3, (0, 0)), (4, (0,))]),
    "alone": lay_out([(6, (5,))]),
}


def states(tree: Tree, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, heads, tree.columns, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def whole_mask(tree: Tree) -> Tensor:
    return torch.block_diag(*(dense_mask(span).double() for span in tree.spans)).bool()


def with_gradients(attend: Callable[[], Tensor], made: list[Tensor]) -> list[Tensor]:
    out = attend()
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, made, torch.randn(out.shape).to(out.dtype))
    return [out.detach(), *grads]


def expected(tree: Tree, made: list[Tensor]) -> list[Tensor]:
    query, key, value = made

    def attend() -> Tensor:
        seen = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=whole_mask(tree), scale=0.3, enable_gqa=True
        )
        return seen.transpose(1, 2)

    return with_gradients(attend, made)


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() < tolerance


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("kernel", [MathKernel, FlashCPUKernel])
def test_slices_equal_a_dense_mask(tree: Tree, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kernel_for", lambda value: kernel())
    made = states(tree)

    def attend() -> Tensor:
        return attention.tree_attention(None, *made, None, tree=tree, scaling=0.3)[0]

    assert_close(with_gradients(attend, made), expected(tree, made))


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_sequences_of_unequal_length_in_one_call_equal_a_dense_mask(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two calls that CUDA's kernels take, with plain attention sequence by sequence in their place."""
    monkeypatch.setattr(flash_varlen, "forward_varlen", plain_forward)
    monkeypatch.setattr(flash_varlen, "backward_varlen", plain_backward)
    made = states(tree)
    assert_close(with_gradients(lambda: varlen_tree(*made, tree, 0.3), made), expected(tree, made))


def pieces(starts: Starts) -> list[tuple[slice, slice]]:
    queries, keys = (places.tolist() for places in (starts.queries, starts.keys))
    return [(slice(*q), slice(*k)) for q, k in zip(pairwise(queries), pairwise(keys), strict=True)]


def heads_first(states: Tensor) -> Tensor:
    return states.transpose(0, 1)[None]


def plain_forward(query: Tensor, key: Tensor, value: Tensor, starts: Starts, causal: bool, scale: float) -> Any:
    assert starts.longest == tuple(int(places.diff().max()) for places in (starts.queries, starts.keys))
    parts = [
        MathKernel().forward(States(*map(heads_first, (query[q], key[k], value[k]))), causal, scale)
        for q, k in pieces(starts)
    ]
    out = torch.cat([part.out[0].transpose(0, 1) for part in parts])
    return out, torch.cat([part.lse[0] for part in parts], dim=1), (causal,)


def plain_backward(
    grad: Tensor, states: Any, whole: Any, starts: Starts, kept: Any, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    assert kept == (causal,)  # each call gets its own random state back
    query, key, value = states
    parts = [
        MathKernel().backward(
            heads_first(grad[q]),
            States(*map(heads_first, (query[q], key[k], value[k]))),
            Attended(heads_first(whole[0][q]), whole[1][None, :, q]),
            causal,
            scale,
        )
        for q, k in pieces(starts)
    ]
    return tuple(torch.cat([part[at][0].transpose(0, 1) for part in parts]) for at in range(3))


def test_half_precision_is_close() -> None:
    made = states(TREES["ragged"], torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in made]

    def attend() -> Tensor:
        return attention.tree_attention(None, *made, None, tree=TREES["ragged"], scaling=0.3)[0]

    found, wanted = with_gradients(attend, made), expected(TREES["ragged"], exact)
    assert found[0].dtype == torch.bfloat16
    assert all((one.double() - other).norm() / other.norm() < 0.01 for one, other in zip(found, wanted, strict=True))


def test_a_row_has_a_column_for_each_token_read() -> None:
    tree = TREES["ragged"]
    assert tree.columns == 5 + 10 + 2 + 2 + 9 + 19
    assert [(run.start, run.count, run.length) for run in tree.runs] == [
        *((0, 1, 5), (5, 1, 7), (12, 1, 3), (15, 1, 2), (17, 1, 2)),
        *((19, 1, 9), (28, 3, 4), (40, 1, 6), (46, 1, 1)),
    ]
    assert tree.own_starts == [0, 5, 12, 15, 17, 19, 28, 32, 36, 40, 46, 47]
    assert tree.shared_starts == ([0, 10, 12, 31], [0, 5, 7, 16])
