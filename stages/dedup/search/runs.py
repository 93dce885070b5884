"""Runs of equal keys in sorted hashes, and the comparison of many short ones side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..arrays import NONE, U64, Bools, Indices

_SEGMENT = 1 << 22  # hashes: some 200 MB with what is made of them
_AT_ONCE = 1 << 16  # pairs compared at once: they stay in the processor's cache
_REPORTED = 1 << 17  # near pairs per block
_EXACT = 16  # runs up to this length are compared with those of the same length,
_WIDENING = 1.1  # longer ones with those up to this factor longer

Pairs = tuple[U64, U64, Indices]  # hashes, and the number of their run


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
    """Runs of about the same length side by side, so that each pair within them is compared once.

    ``hashes``: of a segment; ``starts`` and ``lengths`` (below 65,536): of the runs that are searched; ``labels``: of
    the hashes, equal ones are not compared.
    """

    def __init__(self, hashes: U64, starts: Indices, lengths: Indices, labels: Indices | None = None) -> None:
        self.lengths = lengths
        self._hashes, self._starts, self._labels = hashes, starts, labels
        self._open = lengths > 1
        self._batch = _Batch(NONE, np.empty((0, 0), dtype=np.uint64), None)
        most = max(_AT_ONCE, int(lengths.max(initial=0)))
        self._apart, self._bits = np.empty(most, dtype=np.uint64), np.empty(most, dtype=np.uint8)
        self._is_near = np.empty(most, dtype=bool)

    def near(self, radius: int) -> Iterator[Pairs]:
        """Blocks of near pairs. What is found in a run that is closed may be left out."""
        found: list[Pairs] = []
        count = 0
        for runs, height in self._batches():
            self._batch = self._columns(runs[self._open[runs]], height)
            near: list[tuple[int, Indices]] = []
            waiting = 0
            for row in range(height - 1):
                flat = self._near_row(row, radius)
                if len(flat):
                    near.append((row, flat))
                    waiting += len(flat)
                if waiting and (row == height - 2 or count + waiting >= _REPORTED):
                    found.append(self._pairs(near))
                    count += waiting
                    near, waiting = [], 0
                if count >= _REPORTED:
                    yield _joined(found)
                    found, count = [], 0
        if found:
            yield _joined(found)

    def close(self, runs: Bools) -> None:
        """Leave out these runs from now on."""
        self._open &= ~runs
        self._batch = self._batch[self._open[self._batch.runs]]

    def chains(self, runs: Bools) -> tuple[U64, U64]:
        """Neighbours in some runs."""
        at = [np.arange(self._starts[run], self._starts[run] + self.lengths[run] - 1) for run in np.flatnonzero(runs)]
        left = np.concatenate([NONE, *at])
        return self._hashes[left], self._hashes[left + 1]

    def _batches(self) -> Iterator[tuple[Indices, int]]:
        """Runs that are compared side by side, and the length of the longest."""
        order = np.argsort(self.lengths.astype(np.uint16), kind="stable")  # by digits, as the type is short
        ordered = self.lengths[order]
        first = int(np.searchsorted(ordered, 2))
        while first < len(order):
            shortest = int(ordered[first])
            most = shortest if shortest <= _EXACT else int(shortest * _WIDENING)
            fitting = first + max(1, _AT_ONCE // most)
            last = min(int(np.searchsorted(ordered, most, side="right")), fitting)
            yield order[first:last], int(ordered[last - 1])
            first = last

    def _columns(self, runs: Indices, height: int) -> _Batch:
        """The runs as columns; shorter ones end in what is far from their hashes."""
        lengths, rows = self.lengths[runs], np.arange(height)[:, None]
        equal = not len(runs) or lengths.min() == height
        at = self._starts[runs] + (rows if equal else np.minimum(rows, lengths - 1))
        hashes = self._hashes[at]
        if not equal:
            np.bitwise_not(hashes, out=hashes, where=rows >= lengths)
        return _Batch(runs, hashes, None if self._labels is None else self._labels[at])

    def _near_row(self, row: int, radius: int) -> Indices:
        """Which hashes below a row are near the one in it: positions in the rows below, flattened."""
        others = self._batch.hashes[row + 1 :]
        count = others.size
        apart = self._apart[:count]
        np.bitwise_xor(others, self._batch.hashes[row], out=apart.reshape(others.shape))
        bits = np.bitwise_count(apart, out=self._bits[:count])
        near = np.less_equal(bits, radius, out=self._is_near[:count])
        flat: Indices = near.nonzero()[0]  # faster than in two dimensions
        return flat

    def _pairs(self, near: list[tuple[int, Indices]]) -> Pairs:
        """The hashes that :meth:`_near_row` found, without what fills columns up and what has equal labels."""
        batch = self._batch
        row = np.repeat([row for row, _ in near], [len(flat) for _, flat in near])
        below, column = np.divmod(np.concatenate([flat for _, flat in near]), len(batch.runs))
        below += row + 1
        kept = below < self.lengths[batch.runs[column]]
        if batch.labels is not None:
            kept &= batch.labels[row, column] != batch.labels[below, column]
        row, below, column = row[kept], below[kept], column[kept]
        return batch.hashes[row, column], batch.hashes[below, column], batch.runs[column]


@dataclass(frozen=True)
class _Batch:
    """Runs as columns: ``hashes`` and ``labels`` are ``(length of the longest, runs)``."""

    runs: Indices
    hashes: U64
    labels: Indices | None

    def __getitem__(self, kept: Bools) -> _Batch:
        if kept.all():
            return self
        labels = None if self.labels is None else self.labels[:, kept]
        return _Batch(self.runs[kept], self.hashes[:, kept], labels)


def _joined(blocks: list[Pairs]) -> Pairs:
    left, right, owners = (np.concatenate([block[part] for block in blocks]) for part in range(3))
    return left, right, owners
