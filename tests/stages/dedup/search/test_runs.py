"""Short runs side by side, against each run compared by itself."""

from __future__ import annotations

import numpy as np
import pytest

from capipe.stages.dedup.arrays import U64, Indices
from capipe.stages.dedup.search import runs as module
from capipe.stages.dedup.search.runs import ShortRuns, run_starts, segments

REST = 20  # bits below the key


def sorted_hashes(count: int, keys: int, seed: int) -> U64:
    rng = np.random.default_rng(seed)
    near = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, REST, (3, count), dtype=np.uint64))
    return np.unique((rng.integers(0, keys, count, dtype=np.uint64) << np.uint64(REST)) | near)


def every_pair(hashes: U64, radius: int, labels: Indices | None = None) -> set[tuple[int, int]]:
    apart = np.bitwise_count(hashes[:, None] ^ hashes) <= radius
    apart &= (hashes[:, None] >> np.uint64(REST)) == (hashes >> np.uint64(REST))
    if labels is not None:
        apart &= labels[:, None] != labels
    return {(int(hashes[i]), int(hashes[j])) for i, j in zip(*np.nonzero(np.triu(apart, 1)), strict=True)}


def test_segments_cut_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = sorted_hashes(500, 30, 1)
    for size in (1, 7, 100, 10_000):
        monkeypatch.setattr(module, "_SEGMENT", size)
        parts = list(segments(hashes, REST))
        assert (np.concatenate(parts) == hashes).all()
        assert sum(len(run_starts(part, REST)) for part in parts) == len(run_starts(hashes, REST)) == 30


@pytest.mark.parametrize("at_once", [1, 60, 1 << 16])
@pytest.mark.parametrize("labelled", [False, True])
def test_near_pairs_within_runs_each_once(at_once: int, labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    monkeypatch.setattr(module, "_REPORTED", 40)
    monkeypatch.setattr(module, "_EXACT", 3)
    hashes = sorted_hashes(600, 25, 2)
    starts = run_starts(hashes, REST)
    labels = np.random.default_rng(3).integers(0, 3, len(hashes)) if labelled else None
    runs = ShortRuns(hashes, starts, np.diff(starts, append=len(hashes)), labels)
    found = []
    for left, right, owners in runs.near(3):
        assert (hashes[starts[owners]] >> np.uint64(REST) == left >> np.uint64(REST)).all()
        found += [tuple(sorted(pair)) for pair in zip(left.tolist(), right.tolist(), strict=True)]
    assert len(found) == len(set(found)) and set(found) == every_pair(hashes, 3, labels)
    assert len(found) > 400


def test_a_closed_run_is_left_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPORTED", 1)
    hashes = sorted_hashes(600, 6, 4)
    starts = run_starts(hashes, REST)
    runs = ShortRuns(hashes, starts, np.diff(starts, append=len(hashes)))
    first, *_ = next(iter(runs.near(20)))
    closed = np.arange(len(starts)) == 2
    counts = np.zeros(len(starts), dtype=np.int64)
    runs = ShortRuns(hashes, starts, np.diff(starts, append=len(hashes)))
    for number, (_, _, owners) in enumerate(runs.near(20)):
        counts += np.bincount(owners, minlength=len(counts))
        if number == 0:
            runs.close(closed)
    lengths = np.diff(starts, append=len(hashes))
    whole = lengths * (lengths - 1) // 2
    assert len(first) and (counts[~closed] == whole[~closed]).all() and counts[2] < whole[2]
    left, right = runs.chains(closed)
    assert (left == hashes[starts[2] : starts[3] - 1]).all() and (right == hashes[starts[2] + 1 : starts[3]]).all()
