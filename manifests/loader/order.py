"""The order of samples: which rows a rank and a worker read, how they are shuffled, what a count of samples means.

Pure functions of numbers. An epoch is one sequence: the shards in a shuffled order, of each its selected rows. A rank
has a slice of the sequence, a stream (of one DataLoader worker) a slice of its rank's; slices begin and end within
shards where they must. A stream's rows then pass through a buffer from which they leave in random order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

Tail = Literal["drop", "repeat"]
FIRST = 100  # rows in a buffer before the first one leaves it


class Segment(NamedTuple):
    """Selected rows ``start`` to ``stop`` of a shard, by its index."""

    shard: int
    start: int
    stop: int


class Positioned(NamedTuple):
    """``taken``: samples that each stream has delivered; ``following``: the stream whose batch comes next."""

    taken: tuple[int, ...]
    following: int


def shard_order(count: int, seed: int, epoch: int, shuffled: bool = True) -> list[int]:
    """Indices of ``count`` shards in the order of an epoch; as they are named if not ``shuffled``."""
    order = list(range(count))
    if shuffled:
        random.Random(f"shards {seed} {epoch}").shuffle(order)
    return order


def rank_share(total: int, world: int, tail: Tail) -> int:
    """Number of samples of every rank: ``total / world``, rounded down (drop) or up (repeat)."""
    return total // world if tail == "drop" else -(-total // world)


def stream_sizes(share: int, streams: int) -> list[int]:
    """Sizes of the slices of a rank's share, which differ by one at most, larger ones first."""
    return [share // streams + (stream < share % streams) for stream in range(streams)]


def segments(order: Sequence[int], counts: Sequence[int], start: int, stop: int) -> Iterator[Segment]:
    """Positions ``start`` to ``stop`` of the sequence, which begins anew after its end, as parts of shards.

    ``counts``: selected rows by shard.
    """
    ends = np.fromiter(accumulate(counts[shard] for shard in order), np.int64, len(order))
    total = int(ends[-1]) if len(order) else 0
    while start < stop:
        position = start % total
        place = int(np.searchsorted(ends, position, side="right"))
        shard = order[place]
        first = position - int(ends[place]) + counts[shard]
        length = min(counts[shard] - first, stop - start)
        yield Segment(shard, first, first + length)
        start += length


def buffered(total: int, size: int, seed: str) -> Iterator[int]:
    """The order in which ``total`` rows leave a shuffle buffer of ``size``; their own if ``size`` is under two.

    The rule is that of `webdataset.shuffle`: the buffer grows by one row a sample from :data:`FIRST` on. It stands
    here since a saved position means nothing under another rule.
    """
    if size < 2:
        yield from range(total)
        return
    rng, held, rows = random.Random(seed), list[int](), iter(range(total))
    for row in rows:
        held.append(row)
        if len(held) < size:
            held.extend(more for more in (next(rows, None),) if more is not None)
        if len(held) >= min(FIRST, size):
            yield _leaving(held, rng)
    while held:
        yield _leaving(held, rng)


def _leaving(held: list[int], rng: random.Random) -> int:
    at = rng.randint(0, len(held) - 1)
    row, held[at] = held[at], held[-1]
    held.pop()
    return row


def positioned(sizes: Sequence[int], delivered: int, batch_size: int) -> Positioned:
    """Where streams of these ``sizes`` are after ``delivered`` samples in all.

    A DataLoader takes a batch of each of its workers in turn and passes over those at their end; the last batch of a
    stream may be smaller. Raises ValueError if no batch ends after ``delivered`` samples.
    """
    if not 0 <= delivered <= sum(sizes):
        raise ValueError(f"{delivered:,} samples of {sum(sizes):,}")
    rounds = min(min(sizes) // batch_size, delivered // (batch_size * len(sizes)))
    taken, left, following = [rounds * batch_size] * len(sizes), delivered - rounds * batch_size * len(sizes), 0
    while left:
        batch = min(batch_size, sizes[following] - taken[following])
        if batch > left:
            raise ValueError(f"no batch of {batch_size:,} ends after {delivered:,} samples with {len(sizes)} workers")
        taken[following] += batch
        left -= batch
        following = (following + 1) % len(sizes)
    return Positioned(tuple(taken), following)
