"""All near hashes by tables, against every pair compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np
import pytest

from capipe.stages.dedup.arrays import U64, Indices
from capipe.stages.dedup.groups import Components
from capipe.stages.dedup.search import near_hashes as module
from capipe.stages.dedup.search import runs, tables
from capipe.stages.dedup.search.multi_index import near_pairs
from capipe.stages.dedup.search.near_hashes import Found, near_in_cluster, near_of_table
from capipe.stages.dedup.search.tables import BITS, plan

from ...near import flipped

Pairs = set[tuple[int, int]]


def uniform(count: int, rng: np.random.Generator) -> U64:
    return rng.integers(0, 1 << 64, count, dtype=np.uint64)


def skewed(count: int, rng: np.random.Generator) -> U64:
    """Most bits are the same in most hashes, so that many have equal keys."""
    share = rng.permutation(np.linspace(0.02, 0.98, 64))
    bits = rng.random((count, 64)) < share
    return np.bitwise_or.reduce(bits.astype(np.uint64) << np.arange(64, dtype=np.uint64), axis=1)


def planted(kind: Callable[[int, np.random.Generator], U64], count: int, radius: int, seed: int) -> U64:
    rng = np.random.default_rng(seed)
    hashes = kind(count, rng)
    some = hashes[: count // 3]
    return np.unique(np.concatenate([hashes, flipped(some, rng.integers(0, radius + 3, len(some)), rng)]))


def ball(centre: int, radius: int) -> U64:
    """All hashes within ``radius`` of one."""
    words = [sum(1 << bit for bit in bits) for n in range(radius + 1) for bits in combinations(range(64), n)]
    return np.unique(np.uint64(centre) ^ np.array(words, dtype=np.uint64))


def every_pair(hashes: U64, radius: int) -> Pairs:
    i, j = np.nonzero(np.triu(np.bitwise_count(hashes[:, None] ^ hashes) <= radius, 1))
    return set(zip(hashes[i].tolist(), hashes[j].tolist(), strict=True))


def each_once(found: Iterable[Found]) -> Pairs:
    pairs = [tuple(sorted(pair)) for block in found for pair in zip(*map(np.ndarray.tolist, block[:2]), strict=True)]
    assert len(pairs) == len(set(pairs))
    return {(left, right) for left, right in pairs}


def by_tables(hashes: U64, radius: int, count: int | None = None) -> list[Found]:
    """What the tables for a set of ``count`` hashes find."""
    every = plan(count or len(hashes), BITS, radius)
    return [found for table in every for found in near_of_table(hashes, table, radius)]


@pytest.fixture(params=["as it is", "small"])
def bounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bounds as they are, or so low that each comes into play."""
    if request.param == "small":
        for of, name, value in (
            (module, "LONG", 12), (module, "_TILE", 64), (module, "_BETWEEN_LABELS", 64), (runs, "_SEGMENT", 50),
            (runs, "_AT_ONCE", 60), (runs, "_REPORTED", 20), (tables, "PER_PAIR", 1e-8),
        ):  # fmt: skip
            monkeypatch.setattr(of, name, value)


@pytest.mark.parametrize("kind", [uniform, skewed])
@pytest.mark.parametrize("radius", [0, 3, 7, 15])
@pytest.mark.usefixtures("bounds")
def test_pairs_are_those_of_comparing_all_with_all(
    kind: Callable[[int, np.random.Generator], U64], radius: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, by the tables of sets of any size."""
    monkeypatch.setattr(module, "DENSE", 10**6)
    hashes = planted(kind, 300, radius, radius)
    wanted = every_pair(hashes, radius)
    assert len(wanted) >= 20 or radius == 0
    for count in (len(hashes), 10**6) if radius < 15 else (len(hashes),):  # tables of two blocks, mostly
        assert each_once(by_tables(hashes, radius, count)) == wanted
    assert each_once(near_in_cluster(hashes, radius)) == wanted


def test_many_hashes_as_by_multi_index_hashing() -> None:
    hashes = planted(skewed, 3000, 7, 3)
    i, j = (np.concatenate(part) for part in zip(*near_pairs(hashes, hashes, 7), strict=True))
    wanted = set(zip(hashes[i[i < j]].tolist(), hashes[j[i < j]].tolist(), strict=True))
    assert each_once(found for found in by_tables(hashes, 7) if not found.dense) <= wanted
    assert each_once(near_in_cluster(hashes, 7)) == wanted


def test_nothing_to_compare() -> None:
    for hashes in (np.empty(0, dtype=np.uint64), np.ones(1, dtype=np.uint64)):
        assert each_once(by_tables(hashes, 7, 10**6)) == set() == each_once(near_in_cluster(hashes, 7))


@pytest.mark.parametrize("count", [None, 10**6])
@pytest.mark.parametrize("long", [module.LONG, 12])
def test_a_dense_cluster_is_reported_by_its_hashes(
    count: int | None, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer pairs than its square, from which together with the dense runs all near pairs follow."""
    monkeypatch.setattr(module, "LONG", long)
    monkeypatch.setattr(runs, "_REPORTED", 200)
    rng = np.random.default_rng(5)
    hashes = np.unique(np.concatenate([ball(0x0123_4567_89AB_CDEF, 2)[::7], uniform(100, rng), ball(77, 1)]))
    found = by_tables(hashes, 7, count)
    reported = Components(len(hashes))
    listed = 0
    for left, right, _ in found:
        reported.join(np.searchsorted(hashes, left), np.searchsorted(hashes, right))
        listed += len(left)
    assert any(block.dense for block in found)
    assert listed < len(every_pair(hashes, 7)) / 2 or long == 12  # each of many short runs lists some
    one, other = np.array(sorted(every_pair(hashes, 7)), dtype=np.uint64).T
    roots = [reported.roots(np.searchsorted(hashes, side)) for side in (one, other)]
    assert (roots[0] == roots[1]).all()


def test_joined_hashes_are_not_compared_again() -> None:
    """All of a cluster are joined as they come: some pairs each, not thousands."""
    hashes = ball(99, 2)[::3]
    joined, seen = Components(len(hashes)), 0

    def labels(some: U64) -> Callable[[], Indices]:
        return lambda: joined.roots(np.searchsorted(hashes, some))

    for left, right, _ in near_in_cluster(hashes, 7, labels):
        joined.join(np.searchsorted(hashes, left), np.searchsorted(hashes, right))
        seen += len(left)
    assert not joined.roots(np.arange(len(hashes))).any()
    assert seen < 3 * len(hashes)


def test_with_labels_every_pair_of_what_is_never_joined_comes() -> None:
    hashes = planted(skewed, 500, 7, 8)
    own = np.arange(len(hashes))
    found = near_in_cluster(hashes, 7, lambda some: lambda: own[np.searchsorted(hashes, some)])
    assert each_once(found) == every_pair(hashes, 7)
