"""All pairs of distinct 64-bit hashes within a Hamming radius, exactly, in near-linear time and bounded memory.

Hashes are sorted by each table of :func:`.tables.plan`; only those with equal keys, a run, are compared, and a pair
is reported by the first table in which it has one. A long run is searched in the same way by the bits that are left.

A run most of whose hashes are near each other has as many pairs as its square. It is reported as dense: by its hashes,
not by its pairs. Whoever confirms those needs few of them: :func:`near_in_cluster` leaves out what is joined already.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from ..arrays import U64, Bools, Indices
from .runs import ShortRuns, run_starts, segments
from .tables import BITS, PER_PAIR, Table, plan, seconds

DENSE = 8  # near pairs per hash from which a run is dense
LONG = 512  # hashes; longer runs are searched one by one
_TILE = 1 << 17  # pairs of a long run compared at once
_TURNS = 4  # comparisons of some with all before tables are considered
_BETWEEN_LABELS = 1 << 24  # pairs compared before labels are read again, at most

Restore = Callable[[U64], U64]  # from the layout of a run to the bits of a hash
# For some hashes a function that returns their present labels, which change as pairs are joined.
Labels = Callable[[U64], Callable[[], Indices]]


class Found(NamedTuple):
    """Pairs of near hashes, ``(n,)`` each. ``dense``: a chain through all hashes of a dense run, not all near."""

    left: U64
    right: U64
    dense: bool = False


def near_of_table(hashes: U64, table: Table, radius: int, *, in_place: bool = False) -> Iterator[Found]:
    """Pairs of distinct ``hashes`` within ``radius`` that this table is the first to find, and its dense runs.

    ``in_place``: the memory of ``hashes`` is used, which saves as much.
    """
    arranged = table.arranged(hashes, hashes if in_place else None)
    yield from _Search(radius).of_arranged(arranged, table, _unchanged, dense=True)


def near_in_cluster(hashes: U64, radius: int, labels: Labels | None = None) -> Iterator[Found]:
    """All pairs of distinct ``hashes`` within ``radius``, each once, however many there are.

    Pairs with equal ``labels`` may be left out. Where near ones get equal labels as they come, the time is near-linear.
    """
    for left, right in _Search(radius, labels).all_of(hashes, BITS, _unchanged):
        yield Found(left, right)


def _unchanged(hashes: U64) -> U64:
    return hashes


@dataclass(frozen=True)
class _Search:
    """The search by tables. Hashes of a run have the layout of its table; ``restore`` returns their own bits."""

    radius: int
    labels: Labels | None = None

    def of_arranged(self, arranged: U64, table: Table, restore: Restore, *, dense: bool = False) -> Iterator[Found]:
        """Near pairs that ``table`` is the first to find, in the layout before it. ``dense``: report dense runs.

        ``arranged``: hashes in the layout of the table; they are sorted in place.
        """
        arranged.sort()

        def original(part: U64) -> U64:
            return restore(table.restored(part))

        for segment in segments(arranged, table.rest):
            starts = run_starts(segment, table.rest)
            lengths = np.diff(starts, append=len(segment))
            for at in np.flatnonzero(lengths > LONG).tolist():
                yield from self._long(segment[starts[at] : starts[at] + lengths[at]], table, original, dense)
            short = (lengths > 1) & (lengths <= LONG)
            if short.any():
                labels = self.labels(original(segment))() if self.labels is not None else None
                yield from self._short(ShortRuns(segment, starts[short], lengths[short], labels), table, dense)

    def all_of(self, run: U64, width: int, restore: Restore) -> Iterator[tuple[U64, U64]]:
        """All near pairs of a run whose hashes differ in ``width`` low bits, by what costs least."""
        if self.labels is not None:
            run = yield from self._joining(run, width, self.labels(restore(run)))
        tables = plan(len(run), width, self.radius)
        if not tables[0].chosen:
            yield from self._all_with_all(run)
            return
        for table in tables:
            for left, right, _ in self.of_arranged(table.arranged(run), table, restore):
                yield left, right

    def _long(self, run: U64, table: Table, original: Restore, dense: bool) -> Iterator[Found]:
        pairs = 0
        for left, right in self.all_of(run, table.rest, original):
            found, first = _first_found(table, left, right)
            yield found
            pairs += int(first.sum())
            if dense and pairs > DENSE * len(run):
                hashes = table.restored(run)
                yield Found(hashes[:-1], hashes[1:], dense=True)
                return

    def _short(self, runs: ShortRuns, table: Table, dense: bool) -> Iterator[Found]:
        counts = np.zeros(len(runs.lengths), dtype=np.int64)
        for left, right, owners in runs.near(self.radius):
            found, first = _first_found(table, left, right)
            yield found
            if dense:
                counts += np.bincount(owners[first], minlength=len(counts))
                full = counts > DENSE * runs.lengths
                if full.any():
                    left, right = runs.chains(full)
                    yield Found(table.restored(left), table.restored(right), dense=True)
                    counts[full] = 0
                    runs.close(full)

    def _all_with_all(self, run: U64) -> Iterator[tuple[U64, U64]]:
        rows = max(1, _TILE // max(len(run), 1))
        for start in range(0, len(run), rows):
            row, column = self._near(run[start : start + rows], run[start:])
            upper = column > row
            yield run[start + row[upper]], run[start + column[upper]]

    def _joining(self, run: U64, width: int, labels: Callable[[], Indices]) -> Generator[tuple[U64, U64], None, U64]:
        """Compare some hashes with all others, those outside the largest label first, while that joins much; returns
        the hashes that are still to be compared with each other.

        The first comes alone: what is near it may all be joined before the next.
        """
        left = np.arange(len(run))
        budget = len(run)
        for turn in count():
            now = labels()[left]
            chosen = _outside_the_largest(now)
            if not len(chosen):
                return run[:0]
            if turn >= _TURNS and len(chosen) * len(left) * PER_PAIR > seconds(len(left), width, self.radius):
                rest: U64 = run[left]
                return rest
            chosen = chosen[: max(1, budget // len(left))]
            done = np.zeros(len(left), dtype=bool)
            done[chosen] = True
            rows = max(1, _TILE // len(left))
            for start in range(0, len(chosen), rows):
                part = chosen[start : start + rows]
                row, column = self._near(run[left[part]], run[left])
                row = part[row]
                new = (now[row] != now[column]) & (~done[column] | (column > row))
                yield run[left[row[new]]], run[left[column[new]]]
            left = left[~done]
            budget = min(2 * budget, _BETWEEN_LABELS)
        raise AssertionError

    def _near(self, rows: U64, columns: U64) -> tuple[Indices, Indices]:
        near = np.bitwise_count(rows[:, None] ^ columns) <= self.radius
        (flat,) = near.ravel().nonzero()  # faster than in two dimensions
        return flat // len(columns), flat % len(columns)


def _first_found(table: Table, left: U64, right: U64) -> tuple[Found, Bools]:
    """Of pairs of arranged hashes those that no earlier table finds, restored, and the mask of them."""
    left, right = table.restored(left), table.restored(right)
    first = table.is_first(left, right)
    return Found(left[first], right[first]), first


def _outside_the_largest(labels: Indices) -> Indices:
    """Positions without the most frequent label."""
    names, owners, counts = np.unique(labels, return_inverse=True, return_counts=True)
    del names
    return np.flatnonzero(owners != counts.argmax())
