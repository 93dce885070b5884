"""Sort keys: no two near hashes without an equal one, and each pair under one first table."""

from __future__ import annotations

import math

import numpy as np
import pytest

from capipe.stages.dedup.search.tables import BITS, Table, mixed, plan, sample_of, seconds

from ...near import flipped


@pytest.mark.parametrize(("radius", "count"), [(0, 10**9), (1, 10**7), (7, 10), (7, 10**6), (7, 10**8), (15, 10**5)])
def test_near_hashes_have_one_first_table(radius: int, count: int) -> None:
    rng = np.random.default_rng(radius)
    left = rng.integers(0, 1 << 64, 500, dtype=np.uint64)
    right = flipped(left, rng.integers(0, radius + 1, len(left)), rng)
    tables = plan(count, BITS, radius)
    assert len(tables) == math.comb(radius + len(tables[0].chosen), len(tables[0].chosen))
    firsts = np.zeros(len(left), dtype=np.int64)
    for table in tables:
        rest = np.uint64(table.rest)
        first = table.is_first(left, right)
        equal = ((table.arranged(left) ^ table.arranged(right)) >> rest == 0) | (rest == BITS)
        assert equal[first].all()
        firsts += first
    assert (firsts == 1).all()


def test_larger_sets_and_crowded_keys_have_longer_keys() -> None:
    rng = np.random.default_rng(0)
    keys = [len(plan(count, BITS, 7)[0].chosen) for count in (20, 10**5, 10**7, 10**8, 10**9)]
    assert keys == sorted(keys) and keys[0] == 0 and len(set(keys)) >= 4
    crowded = rng.integers(0, 1 << 64, 50_000, dtype=np.uint64) & np.uint64(0x0F0F_0F0F_0F0F_0F0F)
    assert len(plan(10**6, BITS, 7, crowded)[0].chosen) > len(plan(10**6, BITS, 7)[0].chosen)
    assert seconds(10**6, BITS, 7, crowded) > seconds(10**6, BITS, 7)


@pytest.mark.parametrize(("width", "chosen"), [(64, (0, 2, 5)), (64, (1,)), (41, (0, 1)), (64, ())])
def test_a_layout_is_undone_and_sorts_by_its_key(width: int, chosen: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    table = Table(width, tuple(width * block // 9 for block in range(10)), chosen)
    hashes = rng.integers(0, 1 << 64, 70_000, dtype=np.uint64)
    arranged = table.arranged(hashes)
    assert (table.restored(arranged) == hashes).all() and len(np.unique(arranged)) == len(np.unique(hashes))
    assert (arranged >> np.uint64(width) == hashes >> np.uint64(width)).all() or width == BITS
    mask = sum((1 << table.edges[block + 1]) - (1 << table.edges[block]) for block in chosen)
    if chosen:
        key = arranged >> np.uint64(table.rest)
        own = hashes & np.uint64(mask | ((1 << 64) - (1 << width)))
        order = np.argsort(key, kind="stable")
        assert len(np.unique(key)) == len(np.unique(own))
        assert ((np.diff(key[order]) == 0) == (own[order][1:] == own[order][:-1])).all()
    again = hashes.copy()
    assert table.arranged(again, again) is again and (again == arranged).all()


def test_a_part_holds_whole_keys() -> None:
    rng = np.random.default_rng(2)
    table = plan(10**6, BITS, 7)[3]
    hashes = rng.integers(0, 1 << 64, 3000, dtype=np.uint64)
    outside = np.uint64((1 << table.edges[table.chosen[0]]) - 1)  # bits below the first block of the key
    parts = table.part_of(hashes, 5)
    assert (table.part_of(hashes ^ (mixed(hashes) & outside), 5) == parts).all()
    assert np.bincount(parts.astype(np.int64)).min() > 400


def test_a_sample_is_chosen_by_the_hashes_alone() -> None:
    hashes = np.arange(400_000, dtype=np.uint64) << np.uint64(20)
    some = sample_of(hashes)
    assert 90_000 < len(some) < 110_000 and (sample_of(hashes[::-1])[::-1] == some).all()
    assert len(sample_of(hashes[:1000])) >= 999
