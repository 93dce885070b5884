"""Runs of equal keys in sorted hashes, and the comparison of many short ones side by side."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..arrays import NONE, U64, Bools, Indices

_SEGMENT = 1 << 18  # hashes, some 1 MB
_AT_ONCE = 1 << 16  # pairs compared at once: they stay in the processor's cache
_WORTH_MOVING = 0.75  # hashes are moved together where fewer than this fraction of them is still to be compared


def segments(arranged: U64, rest: int) -> Iterator[U64]:
    """Parts of sorted hashes that no run crosses. ``rest``: number of bits below the key."""
    low = np.uint64((1 << rest) - 1)
    start = 0
    while start < len(arranged):
        last = arranged[min(start + _SEGMENT, len(arranged)) - 1]
        stop = int(np.searchsorted(arranged, last | low, side="right"))
        yield arranged[start:stop]
        start = stop


def run_starts(segment: U64, rest: int) -> Indices:
    """Position of the first hash of each run."""
    other = np.empty(len(segment), dtype=bool)
    other[0] = True
    np.greater(segment[1:] ^ segment[:-1], np.uint64((1 << rest) - 1), out=other[1:])
    return np.flatnonzero(other)


class ShortRuns:
    """Runs side by side, compared at growing distances: hashes one place apart, two places apart, and so on.

    ``hashes``: those of all runs; ``lengths``: of each run; ``labels``: of the hashes, equal ones are not compared.
    """

    def __init__(self, hashes: U64, lengths: Indices, labels: Indices | None = None) -> None:
        self.lengths = lengths
        self._hashes, self._labels = hashes, labels
        self._owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self._open = np.ones(len(lengths), dtype=bool)
        longer = np.bincount(lengths, weights=lengths)[::-1].cumsum()[::-1]
        self._longer = longer.astype(np.int64)  # number of hashes in runs of at least a length
        self._apart = np.empty(_AT_ONCE, dtype=np.uint64)
        self._bits, self._is_near = np.empty(_AT_ONCE, dtype=np.uint8), np.empty(_AT_ONCE, dtype=bool)
        if labels is not None:
            starts = np.cumsum(lengths) - lengths
            self.close(np.minimum.reduceat(labels, starts) == np.maximum.reduceat(labels, starts))

    def near(self, radius: int) -> Iterator[tuple[U64, U64, Indices]]:
        """Blocks of near pairs and their runs."""
        found: list[tuple[U64, U64, Indices]] = []
        count, distance = 0, 1
        while distance + 1 < len(self._longer) and len(self._hashes) > distance:
            at = self._near_at(distance, radius)
            if len(at):
                found.append((self._hashes[at], self._hashes[at + distance], self._owners[at].astype(np.int64)))
                count += len(at)
            if count >= _SEGMENT:
                yield _joined(found)
                found, count = [], 0
            distance += 1
            if distance + 1 < len(self._longer) and self._longer[distance + 1] < _WORTH_MOVING * len(self._hashes):
                self._keep(self._open & (self.lengths > distance))
        if found:
            yield _joined(found)

    def close(self, runs: Bools) -> None:
        """Leave out these runs from now on."""
        self._open &= ~runs
        self._keep(self._open)

    def chains(self, runs: Bools) -> tuple[U64, U64]:
        """Neighbours in some runs, of those that are still compared."""
        chosen = runs[self._owners]
        hashes, owners = self._hashes[chosen], self._owners[chosen]
        within = owners[1:] == owners[:-1]
        return hashes[:-1][within], hashes[1:][within]

    def _near_at(self, distance: int, radius: int) -> Indices:
        last = len(self._hashes) - distance
        found = []
        for start in range(0, last, _AT_ONCE):
            stop = min(start + _AT_ONCE, last)
            count = stop - start
            apart = np.bitwise_xor(
                self._hashes[start:stop], self._hashes[start + distance : stop + distance], out=self._apart[:count]
            )
            bits = np.bitwise_count(apart, out=self._bits[:count])
            (near,) = np.less_equal(bits, radius, out=self._is_near[:count]).nonzero()
            if len(near):
                found.append(start + near)
        if not found:
            return NONE
        at: Indices = np.concatenate(found)
        at = at[self._owners[at] == self._owners[at + distance]]
        if self._labels is not None:
            at = at[self._labels[at] != self._labels[at + distance]]
        return at

    def _keep(self, runs: Bools) -> None:
        kept = runs[self._owners]
        self._hashes, self._owners = self._hashes[kept], self._owners[kept]
        if self._labels is not None:
            self._labels = self._labels[kept]


def _joined(blocks: list[tuple[U64, U64, Indices]]) -> tuple[U64, U64, Indices]:
    left, right, owners = (np.concatenate([block[part] for block in blocks]) for part in range(3))
    return left, right, owners
