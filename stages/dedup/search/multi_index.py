"""The slow twin of :mod:`.near_hashes`: all pairs of 64-bit hashes within a Hamming radius, by multi-index hashing.

A hash has four bands of 16 bits. Two hashes that differ in at most ``radius`` bits differ in at most ``radius // 4``
bits in at least one band; so a hash's partners are found by flipping up to that many bits of each band and looking the
result up in a table of that band. For a radius below 4 no bit is flipped: partners share a whole band.
Time grows with the square of the number of hashes.
After Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with Multi-Index Hashing" (CVPR 2012).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from ..arrays import NONE, U64, Bools, Indices
from ..groups import Contents

BANDS, BITS = 4, 16
PAIRS_AT_ONCE = 1 << 21  # per batch: some 100 MB


def near_pairs(left: U64, right: U64, radius: int) -> Iterator[tuple[Indices, Indices]]:
    """Blocks of ``(i, j)`` with ``left[i]`` and ``right[j]`` at most ``radius`` bits apart; every such pair once."""
    for band in range(BANDS):
        table = _Table(right, band)
        order = np.argsort(_band(left, band), kind="stable")  # sorted, so that look-ups have locality
        keys = _band(left[order], band)
        for mask in _masks(radius // BANDS):
            for i, j in table.partners(keys ^ mask):
                i = order[i]
                apart = left[i] ^ right[j]
                near = np.bitwise_count(apart) <= radius
                i, j = i[near], j[near]
                first = _first_found(apart[near], band, radius // BANDS)
                if first.any():
                    yield i[first], j[first]


def candidates(contents: Contents, radius: int) -> tuple[Indices, Indices]:
    """All pairs ``i < j`` whose hashes are within ``radius``, each once, in order.

    Compares whole images with each other, and with the centres of the others, which finds cropped copies.
    """
    return _collected(
        len(contents),
        (
            (np.minimum(i, j)[i != j], np.maximum(i, j)[i != j])
            for right in (contents.phash, contents.inner)
            for i, j in near_pairs(contents.phash, right, radius)
        ),
    )


def candidates_between(contents: Contents, others: Contents, radius: int) -> tuple[Indices, Indices]:
    """All pairs of a file and one of ``others`` whose hashes are within ``radius``, each once, in order."""
    sides = ((contents.phash, others.phash), (contents.phash, others.inner), (contents.inner, others.phash))
    return _collected(len(others), (pair for left, right in sides for pair in near_pairs(left, right, radius)))


def _collected(width: int, blocks: Iterator[tuple[Indices, Indices]]) -> tuple[Indices, Indices]:
    codes = [np.unique(i * width + j) for i, j in blocks]
    if not codes:
        return NONE, NONE
    distinct = np.unique(np.concatenate(codes))
    return distinct // width, distinct % width


def _band(hashes: U64, band: int) -> Indices:
    return ((hashes >> np.uint64(BITS * band)) & np.uint64((1 << BITS) - 1)).astype(np.int64)


def _masks(bits: int) -> list[int]:
    """All 16-bit words with at most ``bits`` bits set."""
    return [sum(1 << b for b in chosen) for n in range(bits + 1) for chosen in combinations(range(BITS), n)]


def _first_found(apart: U64, band: int, bits: int) -> Bools:
    """True for pairs not found by an earlier band. Within a band a pair is found under one mask only."""
    new = np.ones(len(apart), dtype=bool)
    for earlier in range(band):
        new &= np.bitwise_count(_band(apart, earlier)) > bits
    return new


class _Table:
    """Positions in ``hashes`` by the value of one band."""

    def __init__(self, hashes: U64, band: int) -> None:
        keys = _band(hashes, band)
        self._order = np.argsort(keys, kind="stable")
        self._starts = np.zeros((1 << BITS) + 1, dtype=np.int64)
        np.cumsum(np.bincount(keys, minlength=1 << BITS), out=self._starts[1:])

    def partners(self, keys: Indices) -> Iterator[tuple[Indices, Indices]]:
        """Blocks of (position in ``keys``, position in the hashes) for all hashes with that key."""
        counts = self._starts[keys + 1] - self._starts[keys]
        ends = np.cumsum(counts)
        first = 0
        while first < len(keys):
            done = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")))
            block = counts[first:last]
            i = np.repeat(np.arange(first, last), block)
            within = np.arange(len(i)) - np.repeat(ends[first:last] - block - done, block)
            yield i, self._order[self._starts[keys[i]] + within]
            first = last
