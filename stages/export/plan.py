"""Plan of an export's shards: those of the source, or new ones of at most a given number of pairs. Reads no images.

Each source shard is read once, whole, by one process: new shards are either several consecutive ones merged, or parts
of one. So its bytes are verified, and memory and disk for unfinished work do not grow with the dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ...manifests.artifact import Artifact
from ...manifests.files.growing_lines import collector_paused
from ...manifests.fingerprint import canonical
from ...manifests.manifest import ShardRecord, made_of
from ...manifests.status import Status
from ..filter.select import group
from .source import column_of, listing


@dataclass(frozen=True)
class Piece:
    """A shard to write: rows ``start`` to ``stop`` of its task. ``over``: the committed version that it replaces."""

    shard: str
    start: int
    stop: int
    over: ShardRecord | None = None


@dataclass(frozen=True)
class ExportTask:
    """Work of one process: the concatenated rows of ``sources``, split into ``pieces``.

    ``copied``: a single source shard, unchanged and under its own name.
    """

    sources: tuple[ShardRecord, ...]
    pieces: tuple[Piece, ...]
    copied: bool = True

    @property
    def shard(self) -> str:
        return self.pieces[0].shard

    def made_of(self, source: Artifact, piece: Piece) -> dict[str, Any]:
        """Input of a piece for the manifest; its digests change if the source is rebuilt."""
        if self.copied:
            return _whole(source, self.sources[0])
        parts, offset = [], 0
        for record in self.sources:
            start, stop = max(0, piece.start - offset), min(record.count, piece.stop - offset)
            if start < stop:
                parts.append({**_whole(source, record), "name": record.shard, "from": start, "to": stop})
            offset += record.count
        # Without locations: the same rows of the same shards are the same input.
        marks = [[part["digest"], part["rows"], part["from"], part["to"]] for part in parts]
        return {"digest": hashlib.sha256(canonical(marks).encode()).hexdigest(), "shards": parts}


def _whole(source: Artifact, record: ShardRecord) -> dict[str, Any]:
    """Entry for a whole source shard: by its tar, or by its listing if it is of an index."""
    tar, rows = f"{record.shard}.tar", listing(record.shard)
    name = tar if tar in record.files else rows
    file = record.files[name]
    return {
        "url": f"{source.url}/{name}",
        "digest": file["sha256"],
        "bytes": file["bytes"],
        "rows": record.files[rows]["sha256"],
    }


def as_they_are(records: Sequence[ShardRecord]) -> list[ExportTask]:
    """One task per shard of the source."""
    with collector_paused():
        return [ExportTask((record,), (Piece(record.shard, 0, record.count),)) for record in records]


def of_size(source: Artifact, records: Sequence[ShardRecord], size: int) -> list[ExportTask]:
    """Numbered shards of at most ``size`` pairs. Consecutive ones are merged as long as they fit; a larger one is split
    into equal parts. Rows that are not pairs stay with the pair before them."""
    tasks, number = [], 0
    for run in group([_pairs(record) for record in records], size):
        sources = [records[index] for index in run]
        cuts = [*_cuts(source, sources, size), sum(record.count for record in sources)]
        spans = pairwise(cuts)
        pieces = tuple(Piece(f"{number + at:05d}", start, stop) for at, (start, stop) in enumerate(spans))
        tasks.append(ExportTask(tuple(sources), pieces, copied=False))
        number += len(pieces)
    return tasks


def as_before(records: Sequence[ShardRecord], exported: Sequence[ShardRecord]) -> list[ExportTask] | None:
    """Tasks with the bounds of an earlier export's shards (``exported``), which rows that were withdrawn since do not
    move; None unless these are made of all rows of ``records``."""
    tasks: list[ExportTask] = []
    sources = {record.shard: record for record in records}
    for shard in sorted(exported, key=lambda record: (len(record.shard), record.shard)):  # numbers of any length
        entries = made_of(shard)
        spans = [(sources.get(entry["name"]), entry.get("from"), entry.get("to")) for entry in entries]
        if any(record is None or start is None or stop is None for record, start, stop in spans):
            return None
        parts = [record for record, _, _ in spans if record is not None]
        start, length = entries[0]["from"], sum(entry["to"] - entry["from"] for entry in entries)
        if start and tasks and tasks[-1].sources == (parts[0],):  # a later part of the same source shard
            pieces = (*tasks[-1].pieces, Piece(shard.shard, start, start + length))
            tasks[-1] = replace(tasks[-1], pieces=pieces)
        else:
            tasks.append(ExportTask(tuple(parts), (Piece(shard.shard, start, start + length),), copied=False))
    return tasks if _covers(tasks, records) else None


def _covers(tasks: Sequence[ExportTask], records: Sequence[ShardRecord]) -> bool:
    """True if tasks have every row of the source shards once."""
    for task in tasks:
        bounds = [0, *(piece.stop for piece in task.pieces)]
        rows = sum(record.count for record in task.sources)
        if [piece.start for piece in task.pieces] != bounds[:-1] or bounds[-1] != rows:
            return False
    return [record.shard for task in tasks for record in task.sources] == [record.shard for record in records]


def _pairs(record: ShardRecord) -> int:
    return record.rows.get(Status.OK, 0)


def _cuts(source: Artifact, records: Sequence[ShardRecord], size: int) -> list[int]:
    """First rows of the parts of at most ``size`` pairs, starting with 0."""
    pairs = sum(map(_pairs, records))
    count = max(1, -(-pairs // size))
    if count == 1:
        return [0]
    wanted = {pairs * part // count for part in range(1, count)}
    return [0, *(row for pair, row in enumerate(_pair_rows(source, records)) if pair in wanted)]


def _pair_rows(source: Artifact, records: Sequence[ShardRecord]) -> Iterator[int]:
    """Row numbers of the pairs."""
    offset = 0
    for record in records:
        statuses = column_of(source, record, "status")
        yield from (offset + row for row, status in enumerate(statuses) if status == Status.OK)
        offset += record.count
