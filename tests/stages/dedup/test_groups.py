"""Union-find on arrays, and what needs no search."""

from __future__ import annotations

import numpy as np
import pytest

from capipe.stages.dedup.groups import Components, Contents, connected, keepers, lookalikes


def plainly_connected(count: int, left: list[int], right: list[int]) -> list[int]:
    """The slow twin: union-find, one pair after another."""
    parents = list(range(count))

    def root(node: int) -> int:
        while parents[node] != node:
            node = parents[node]
        return node

    for i, j in zip(left, right, strict=True):
        a, b = root(i), root(j)
        parents[max(a, b)] = min(a, b)
    return [root(node) for node in range(count)]


def test_groups_are_chains_of_pairs() -> None:
    groups = connected(7, np.array([5, 1, 3]), np.array([3, 6, 1]))
    assert groups.tolist() == [0, 1, 2, 1, 4, 1, 1]


@pytest.mark.parametrize("pairs", [0, 100, 350, 2000])
def test_groups_are_those_of_one_pair_after_another(pairs: int) -> None:
    """In any number of blocks, and with the lowest node of each component as its root."""
    rng = np.random.default_rng(pairs)
    left, right = rng.integers(0, 700, (2, pairs))
    wanted = plainly_connected(700, left.tolist(), right.tolist())
    assert connected(700, left, right).tolist() == wanted
    components = Components(700)
    for block in np.array_split(np.arange(pairs), 7):
        components.join(left[block], right[block])
    assert components.roots(np.arange(700)).tolist() == wanted


def test_a_long_chain_is_one_group() -> None:
    order = np.random.default_rng(0).permutation(20_000)
    assert not connected(20_000, order[:-1], order[1:]).any()


def test_lookalikes_need_every_number_alike() -> None:
    numbers = np.array([1, 1, 1, 2], dtype=np.uint64)
    other = np.array([1, 2, 1, 1], dtype=np.uint64)
    contents = Contents(
        np.array([b"a", b"b", b"c", b"d"], dtype="S16"), np.ones(4, dtype=np.int64), numbers, other, other
    )
    assert lookalikes(contents).tolist() == [0, 1, 0, 3]


def test_the_keeper_has_the_highest_preference_then_most_pixels_then_the_lowest_uid() -> None:
    hashes = np.zeros(6, dtype=np.uint64)
    contents = Contents(np.zeros(6, dtype="S16"), np.array([5, 9, 9, 1, 2, 2]), hashes, hashes, hashes)
    groups = np.array([0, 0, 0, 3, 3, 3])
    assert keepers(contents, groups).tolist() == [1, 1, 1, 4, 4, 4]
    nan = np.nan
    assert keepers(contents, groups, np.array([0.5, nan, 0.5, nan, nan, -9])).tolist() == [2, 2, 2, 5, 5, 5]
    assert keepers(contents, groups, np.array([0.6, 0.1, 0.5, nan, nan, nan])).tolist() == [0, 0, 0, 4, 4, 4]
