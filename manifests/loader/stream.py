"""The samples of one stream: a worker's part of a rank's share of an epoch, from any position on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...errors import DamagedShard
from ..fingerprint import canonical
from .images import Undecodable
from .members import Loaded, load
from .mix import pick
from .order import Segment, Tail, buffered, rank_share, segments, shard_order, stream_sizes
from .rows import Query, RowCounts, caption_column, score_column, selected_rows
from .sources import Source


@dataclass(frozen=True)
class Plan:
    """Everything that decides the samples of an epoch. ``counts``: by shard; ``mix``: weights of captions by name.

    ``decode``: the function of an image's bytes, None for the bytes.
    """

    sources: Sequence[Source]
    counts: Sequence[RowCounts]
    query: Query
    mix: Mapping[str, float]
    seed: int
    shuffle: int
    tail: Tail
    rank: int
    world: int
    decode: Callable[[bytes], Any] | None

    @property
    def selected(self) -> int:
        """Samples of all ranks before the tail is dropped or repeated."""
        return sum(counts.selected for counts in self.counts)

    @property
    def share(self) -> int:
        """Samples of this rank, and of every other, in an epoch."""
        return rank_share(self.selected, self.world, self.tail)

    def settings(self) -> dict[str, Any]:
        """What decides the order of samples, for comparison with a saved state; the same on all ranks."""
        order = {"seed": self.seed, "shuffle": self.shuffle, "tail": self.tail, "world": self.world}
        return {**identity(self.sources, self.query, self.mix), **order}


def identity(sources: Sequence[Source], query: Query, mix: Mapping[str, float]) -> dict[str, Any]:
    """What decides which rows are selected. ``rows``: sha256 over the sidecars' checksums, which cover the images'
    uids; where the files are is no part of it."""
    digest = hashlib.sha256()
    for source in sources:
        sidecars = [[sidecar.name, sidecar.sha256, sidecar.part] for sidecar in source.sidecars]
        digest.update(canonical([source.name, sidecars]).encode())
    where = None if query.where is None else query.where.text
    return {"rows": digest.hexdigest(), "where": where, "mix": dict(mix)}


def samples(plan: Plan, epoch: int, stream: int, streams: int, start: int = 0) -> Iterator[dict[str, Any]]:
    """The samples of stream ``stream`` of ``streams``, without the first ``start`` of them.

    Those are passed over as numbers: of the tars and sidecars only what is still needed is read.
    """
    sizes, selected = stream_sizes(plan.share, streams), [counts.selected for counts in plan.counts]
    first = plan.rank * plan.share + sum(sizes[:stream])
    order = shard_order(len(plan.sources), plan.seed, epoch, shuffled=plan.shuffle > 0)
    parts = segments(order, selected, first, first + sizes[stream])
    leaving = buffered(sizes[stream], plan.shuffle, f"buffer {plan.seed} {epoch} {plan.rank} {stream} {streams}")
    delivered = bytearray(sizes[stream])
    for number in islice(leaving, start):
        delivered[number] = 1
    loading, ahead = _loaded(plan, parts, delivered, selected), dict[int, tuple[Source, Loaded]]()
    for number in leaving:
        while number not in ahead:
            at, source, loaded = next(loading)
            ahead[at] = source, loaded
        yield _sample(plan, epoch, *ahead.pop(number))


def _loaded(
    plan: Plan, parts: Iterator[Segment], delivered: bytearray, selected: Sequence[int]
) -> Iterator[tuple[int, Source, Loaded]]:
    """The rows of a stream in their own order, with their numbers in it and their images, but for those delivered."""
    first = 0
    for shard, start, stop in parts:
        wanted = [row for row in range(start, stop) if not delivered[first + row - start]]
        if wanted:
            source = plan.sources[shard]
            table, counts = selected_rows(source, plan.query)
            if counts.selected != selected[shard]:
                found = f"{counts.selected:,} rows selected, {selected[shard]:,} counted before"
                raise DamagedShard(f"{source.url}: {found}; its sidecars changed since: open the data set anew")
            for row, loaded in zip(wanted, load(source, table.take(wanted).to_pylist()), strict=True):
                yield first + row - start, source, loaded
        first += stop - start


def _sample(plan: Plan, epoch: int, source: Source, loaded: Loaded) -> dict[str, Any]:
    row = loaded.row
    captions = {name: text for name in plan.mix if (text := row[caption_column(name)]) is not None}
    name = pick(plan.mix, captions, plan.seed, epoch, row["uid"])
    try:
        image = loaded.image if plan.decode is None else plan.decode(loaded.image)
    except Undecodable as error:
        text = f"{source.url}: the image of {row['key']!r} cannot be decoded ({error})"
        raise DamagedShard(f"{text}; leave it out by where=, or take bytes (decode=None)") from None
    return {
        "key": row["key"],
        "uid": row["uid"],
        "image": image,
        "caption": captions[name],
        "caption_name": name,
        "scores": {shown: row[score_column(shown)] for shown in plan.query.columns},
        "json": loaded.json,
    }
