"""A batch that fails is halved, down to the item at fault."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch

from capipe.models.halving import OF_DEVICES, by_halves


class Halver:
    """Halves even numbers; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        for item in items:
            if item % 2:
                raise ValueError(f"{item} is odd")
        return [item // 2 for item in items]


def test_a_batch_without_fault_is_computed_once_and_none_not_at_all() -> None:
    halver = Halver()
    assert by_halves([2, 4, 6], halver) == [1, 2, 3] and by_halves([], halver) == []
    assert halver.batches == [[2, 4, 6]]


def test_each_item_has_its_own_result_or_its_own_error() -> None:
    rng = Random(3)
    for _ in range(200):
        items = [rng.randrange(100) if rng.random() < 0.2 else 2 * rng.randrange(50) for _ in range(rng.randrange(40))]
        for item, outcome in zip(items, by_halves(items, Halver()), strict=True):
            assert str(outcome) == (f"{item} is odd" if item % 2 else str(item // 2))


def test_one_fault_costs_few_batches() -> None:
    halver = Halver()
    outcomes = by_halves([7 if n == 40 else 2 * n for n in range(64)], halver)
    assert [n for n, each in enumerate(outcomes) if isinstance(each, Exception)] == [40]
    assert len(halver.batches) == 1 + 2 * 6


def test_an_error_holds_nothing_of_its_batch() -> None:
    (error,) = by_halves([1], Halver())
    assert isinstance(error, ValueError)
    assert error.__traceback__ is None and error.__context__ is None and error.__cause__ is None


@pytest.mark.parametrize("error", [torch.AcceleratorError("fault"), torch.OutOfMemoryError("no room"), MemoryError()])
def test_what_is_no_items_fault_is_raised_at_once(error: Exception) -> None:
    batches = []

    def failing(items: Sequence[int]) -> list[int]:
        batches.append(len(items))
        raise error

    with pytest.raises(type(error)):
        by_halves([1, 2, 3, 4], failing, OF_DEVICES)
    assert batches == [4]
