"""Sort keys under which near hashes meet: choices of blocks of their bits, and the cost model that chooses them.

Of m blocks of a hash at least k = m - radius are equal in two hashes within ``radius``. So each choice of k blocks is a
sort key, and near hashes have the same one in at least one of the C(m, k) tables. After Manku, Jain and Das Sarma,
"Detecting Near-Duplicates for Web Crawling" (WWW 2007).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from ..arrays import U64, Bools

BITS = 64
MOST_CHOSEN = 6  # blocks of a key
# Seconds on one core, per table, per hash of a table, per pair of hashes with the same key. Measured with numpy 2.3 and
# its vectorised sort; only their ratios matter.
_PER_TABLE, _PER_HASH, PER_PAIR = 1e-3, 2.2e-8, 2.1e-9
SAMPLE = 100_000  # hashes
_SAMPLED_TABLES = 12
_AT_ONCE = 1 << 15  # hashes whose bits are moved at once: they stay in the processor's cache


@dataclass(frozen=True)
class Table:
    """A sort key of the ``width`` low bits of a hash; the bits above are the same in all hashes, and stay.

    ``edges``: first bits of the m blocks, and ``width``; ``chosen``: the blocks of the key, in ascending order.
    """

    width: int
    edges: tuple[int, ...]
    chosen: tuple[int, ...]

    @cached_property
    def rest(self) -> int:
        """Number of bits below the key in an arranged hash."""
        return self.width - sum(self.edges[block + 1] - self.edges[block] for block in self.chosen)

    def arranged(self, hashes: U64, out: U64 | None = None) -> U64:
        """Move the bits of the key above the other ``width`` low bits, so that hashes sort by it. A copy, or ``out``,
        which may be ``hashes``."""
        return _moved(hashes, self._moves, np.empty_like(hashes) if out is None else out)

    def restored(self, arranged: U64) -> U64:
        """The inverse of :meth:`arranged`."""
        return _moved(arranged, [(to, first, size) for first, to, size in self._moves], np.empty_like(arranged))

    def is_first(self, left: U64, right: U64) -> Bools:
        """True where this is the first table in which two near hashes have the same key: the first equal blocks are
        the chosen ones."""
        apart = left ^ right
        first = np.ones(len(apart), dtype=bool)
        for block in range(self.chosen[-1] + 1 if self.chosen else 0):
            equal = apart & np.uint64(self._mask(block)) == 0
            first &= equal if block in self.chosen else ~equal
        return first

    def part_of(self, hashes: U64, parts: int) -> U64:
        """A number below ``parts`` for each hash, the same for hashes with the same key."""
        key = sum(self._mask(block) for block in self.chosen)
        return mixed(hashes & np.uint64(key)) % np.uint64(parts)

    def _mask(self, block: int) -> int:
        return (1 << self.edges[block + 1]) - (1 << self.edges[block])

    @cached_property
    def _moves(self) -> list[tuple[int, int, int]]:
        """``(first bit, its new place, number of bits)``; neighbours that stay neighbours are moved together."""
        blocks = range(len(self.edges) - 1)
        order = [block for block in blocks if block not in self.chosen] + list(self.chosen)
        moves: list[tuple[int, int, int]] = []
        to = 0
        for block in order:
            first, size = self.edges[block], self.edges[block + 1] - self.edges[block]
            if moves and sum(moves[-1][::2]) == first:
                moves[-1] = moves[-1][0], moves[-1][1], moves[-1][2] + size
            else:
                moves.append((first, to, size))
            to += size
        if self.width < BITS:
            moves.append((self.width, self.width, BITS - self.width))
        return moves


def plan(count: int, width: int, radius: int, sample: U64 | None = None, per_table: float = _PER_TABLE) -> list[Table]:
    """The tables that find all pairs within ``radius`` of ``count`` distinct hashes that differ in ``width`` low bits.

    The number of chosen blocks is that of the lowest cost; none, hence one table with an empty key, where comparing all
    with all is cheapest. ``sample``: some of the hashes, by which the cost allows for crowded keys.
    """
    return _tables(width, radius, _cheapest(count, width, radius, sample, per_table)[1])


def seconds(count: int, width: int, radius: int, sample: U64 | None = None, per_table: float = _PER_TABLE) -> float:
    """Seconds on one core of the search by the tables of :func:`plan`."""
    return _cheapest(count, width, radius, sample, per_table)[0]


def _cheapest(count: int, width: int, radius: int, sample: U64 | None, per_table: float) -> tuple[float, int]:
    """Least cost, in seconds, and its number of chosen blocks."""
    choices = [k for k in range(MOST_CHOSEN + 1) if k == 0 or radius + k <= width]
    return min((_cost(count, width, radius, k, sample, per_table), k) for k in choices)


def _cost(count: int, width: int, radius: int, chosen: int, sample: U64 | None, per_table: float) -> float:
    """Seconds to sort by each table of ``chosen`` blocks, and to compare hashes with equal keys.

    As many pairs have one as of evenly spread hashes, or as of the sample.
    """
    blocks = max(radius + chosen, 1)
    equal = 2.0 ** -(width * chosen / blocks)
    if sample is not None and chosen:
        equal = max(equal, _share_of_equal_keys(sample, _tables(width, radius, chosen)))
    pairs = equal * count * (count - 1) / 2
    return float(math.comb(blocks, chosen) * (per_table + _PER_HASH * count + PER_PAIR * pairs))


def sample_of(hashes: U64) -> U64:
    """Some :data:`SAMPLE` of the hashes, chosen by a hash of theirs."""
    bound = min(SAMPLE / max(len(hashes), 1), 1.0)
    return hashes[mixed(hashes) <= np.uint64(bound * (2.0**32 - 1))]


def mixed(hashes: U64) -> U64:
    """32-bit numbers that spread any hashes evenly (Fibonacci hashing, twice)."""
    factor = np.uint64(0x9E3779B97F4A7C15)
    once = hashes * factor
    return ((once ^ (once >> np.uint64(32))) * factor) >> np.uint64(32)


def _share_of_equal_keys(sample: U64, tables: list[Table]) -> float:
    """Share of the pairs of a sample that have the same key, on average over some of the tables."""
    total = 0.0
    some = tables[:: max(1, len(tables) // _SAMPLED_TABLES)]
    for table in some:
        keys = np.sort(table.arranged(sample) >> np.uint64(table.rest))
        lengths = np.diff(np.flatnonzero(np.diff(keys, prepend=~keys[:1])), append=len(keys)).astype(np.float64)
        total += (lengths * (lengths - 1)).sum()
    return total / len(some) / max(len(sample) * (len(sample) - 1), 1)


def _tables(width: int, radius: int, chosen: int) -> list[Table]:
    blocks = max(radius + chosen, 1)
    edges = tuple(width * block // blocks for block in range(blocks + 1))
    return [Table(width, edges, which) for which in combinations(range(blocks), chosen)]


def _moved(hashes: U64, moves: list[tuple[int, int, int]], out: U64) -> U64:
    made, bits = (np.empty(min(_AT_ONCE, len(hashes)), dtype=np.uint64) for _ in range(2))
    for start in range(0, len(hashes), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        taken = hashes[part]
        into, some = made[: len(taken)], bits[: len(taken)]
        into[...] = 0
        for first, to, size in moves:
            np.bitwise_and(taken, np.uint64((1 << first + size) - (1 << first)), out=some)
            if to > first:
                np.left_shift(some, np.uint64(to - first), out=some)
            elif to < first:
                np.right_shift(some, np.uint64(first - to), out=some)
            np.bitwise_or(into, some, out=into)
        out[part] = into
    return out
