"""The slow twin of the search, against every pair compared."""

from __future__ import annotations

import numpy as np
import pytest

from capipe.stages.dedup.search.multi_index import near_pairs


@pytest.mark.parametrize("radius", [0, 3, 4, 7, 9])
def test_near_pairs_are_those_of_comparing_all_with_all(radius: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capipe.stages.dedup.search.multi_index.PAIRS_AT_ONCE", 50)
    rng = np.random.default_rng(radius)
    left = rng.integers(0, 1 << 63, 200, dtype=np.uint64)
    right = left[rng.integers(0, 200, 150)].copy()
    for at in range(150):
        for bit in rng.choice(64, rng.integers(0, 12), replace=False):
            right[at] ^= np.uint64(1) << np.uint64(bit)
    found = [
        (i, j) for block in near_pairs(left, right, radius) for i, j in zip(*map(np.ndarray.tolist, block), strict=True)
    ]
    apart = np.bitwise_count(left[:, None] ^ right[None])
    assert len(found) == len(set(found)) and set(found) == set(
        zip(*map(np.ndarray.tolist, np.nonzero(apart <= radius)), strict=True)
    )
    assert len(found) >= 5
