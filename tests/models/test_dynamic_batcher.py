"""What waits together is computed together; who is to blame fails alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from capipe.models.dynamic_batcher import MOST, DynamicBatcher, most_on
from capipe.models.engines.base import EngineDead
from capipe.models.lru_cache import LRUCache


class Squares:
    """Remembers its batches; cannot do negative numbers."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, asked: Sequence[int]) -> list[int]:
        self.batches.append(list(asked))
        if min(asked) < 0:
            raise ValueError("negative")
        return [each * each for each in asked]


async def test_calls_that_wait_share_a_batch() -> None:
    squares = Squares()
    together: DynamicBatcher[int, int] = DynamicBatcher(squares, most=4)
    assert await asyncio.gather(*(together.ask(n) for n in range(6))) == [0, 1, 4, 9, 16, 25]
    assert squares.batches == [[0, 1, 2, 3], [4, 5]]
    assert await together.ask(7) == 49
    await together.aclose()


async def test_a_call_that_fails_costs_the_others_nothing() -> None:
    squares = Squares()
    together: DynamicBatcher[int, int] = DynamicBatcher(squares)
    told = await asyncio.gather(*(together.ask(n) for n in (1, -2, 3)), return_exceptions=True)
    assert told[0] == 1 and told[2] == 9 and isinstance(told[1], ValueError)
    await together.aclose()


async def test_what_is_closed_answers_nobody() -> None:
    together: DynamicBatcher[int, int] = DynamicBatcher(Squares())
    waiting = asyncio.gather(together.ask(1), together.ask(2), return_exceptions=True)
    await asyncio.sleep(0)
    await together.aclose()
    assert all(isinstance(each, EngineDead) for each in await waiting)
    with pytest.raises(EngineDead, match="closed"):
        await together.ask(3)


def test_the_oldest_goes_first() -> None:
    recent: LRUCache[str, int] = LRUCache(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == (1, None, 3)
    recent.drop("a")
    assert recent.get("a") is None


def test_on_a_cpu_a_batch_is_one_call() -> None:
    assert most_on(torch.device("cpu")) == 1 and most_on(torch.device("cuda")) == MOST
