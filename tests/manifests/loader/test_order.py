"""Orders, shares and positions, as numbers alone."""

from __future__ import annotations

import random
from itertools import chain, islice

import pytest
import webdataset

from capipe.manifests.loader.order import (
    Positioned,
    Segment,
    Tail,
    buffered,
    positioned,
    rank_share,
    segments,
    shard_order,
    stream_sizes,
)


def test_shards_are_in_another_order_each_epoch_and_always_in_the_same() -> None:
    orders = [shard_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4 and all(sorted(order) == list(range(50)) for order in orders)
    assert shard_order(50, 1, 0) == orders[2] and shard_order(3, 0, 0, shuffled=False) == [0, 1, 2]


@pytest.mark.parametrize(("total", "size"), [(0, 5), (1, 5), (57, 1000), (1000, 10), (1000, 300), (150, 2), (99, 100)])
def test_the_buffer_is_that_of_webdataset(total: int, size: int) -> None:
    theirs = webdataset.shuffle(size, rng=random.Random("seed"))(iter(range(total)))
    ours = list(buffered(total, size, "seed"))
    assert ours == list(theirs) and sorted(ours) == list(range(total))


def test_no_buffer_keeps_the_order() -> None:
    assert list(buffered(5, 0, "seed")) == list(buffered(5, 1, "seed")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("tail", ["drop", "repeat"])
def test_ranks_have_equal_shares_of_all_rows(world: int, tail: Tail) -> None:
    """Also where there are more ranks than shards, or than rows."""
    counts, order = [5, 0, 7, 1, 19], [4, 1, 0, 3, 2]
    share = rank_share(32, world, tail)
    ranks = [list(segments(order, counts, rank * share, (rank + 1) * share)) for rank in range(world)]
    assert all(sum(part.stop - part.start for part in parts) == share for parts in ranks)
    rows = [(part.shard, row) for parts in ranks for part in parts for row in range(part.start, part.stop)]
    everything = [(shard, row) for shard in order for row in range(counts[shard])]
    if tail == "drop":
        assert rows == everything[: share * world] and 32 - len(rows) < world
    else:
        assert rows == list(islice(chain(everything, everything), len(rows))) and len(rows) - 32 < world


def test_segments_end_within_shards() -> None:
    found = list(segments([2, 0, 1], [4, 0, 3], 2, 6))
    assert found == [Segment(2, 2, 3), Segment(0, 0, 3)]
    assert list(segments([0], [0], 0, 0)) == []


def test_streams_differ_by_one_at_most_larger_ones_first() -> None:
    assert stream_sizes(10, 4) == [3, 3, 2, 2] and stream_sizes(2, 4) == [1, 1, 0, 0] and stream_sizes(8, 1) == [8]


@pytest.mark.parametrize("share", [0, 1, 10, 23, 24, 57])
@pytest.mark.parametrize("streams", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_positions_are_those_of_batches_in_turn(share: int, streams: int, batch_size: int) -> None:
    """Against the rule spelled out; at all other counts there is none."""
    sizes = stream_sizes(share, streams)
    taken, ends, at = [0] * streams, {0: [0] * streams}, 0
    while sum(taken) < share:
        taken[at] += min(batch_size, sizes[at] - taken[at])
        ends[sum(taken)] = list(taken)
        at = (at + 1) % streams
    for delivered in range(share + 1):
        if delivered in ends:
            assert list(positioned(sizes, delivered, batch_size).taken) == ends[delivered]
        else:
            with pytest.raises(ValueError, match="no batch of"):
                positioned(sizes, delivered, batch_size)


def test_the_stream_whose_turn_it_is() -> None:
    assert positioned([5, 5, 4], 8, 4) == Positioned((4, 4, 0), 2)
    with pytest.raises(ValueError, match="15 samples of 14"):
        positioned([5, 5, 4], 15, 4)
