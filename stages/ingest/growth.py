"""Incremental ingest of a source that has changed: new items are distinguished from those already ingested.

Each ingested shard has a file with 8 bytes of every item's identity hash, in row order. They identify an item wherever
it is in the source now, so files added to a folder start new shards, and no existing shard changes. Memory: 17 bytes
per item of the shards whose cut differs now, and the new items that come before the last of the old ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ...errors import ArtifactMismatch
from ...manifests.artifact import Artifact
from ...manifests.files.storage import PRIVATE
from ...manifests.manifest import ShardRecord
from ...manifests.status import Status
from .source_refs import GoneRef, ItemRef, identities

_BYTES = 8
_UNREAD = (Status.READ_ERROR, Status.MISSING)  # rows whose items may leave the source: none of their bytes are kept

Found = tuple[tuple[ItemRef, ...], ShardRecord | None]


def items_file(shard: str) -> str:
    return f"{PRIVATE}/items/{shard}.bin"


def marks_of(refs: Iterable[ItemRef]) -> bytes:
    """Contents of :func:`items_file`."""
    return b"".join(_mark(ref.identity()) for ref in refs)


def _mark(identity: str) -> bytes:
    return hashlib.sha256(identity.encode()).digest()[:_BYTES]


def grown(artifact: Artifact, committed: Mapping[str, ShardRecord], refs: Iterable[ItemRef]) -> Iterator[Found]:
    """Items of the shards still to be written: new shards, or ``committed`` ones with rows to retry.

    Raises ArtifactMismatch if an item of a committed shard is gone, unless it could not be read at that time.
    """
    size = int(artifact.config["semantic"].get("shard_size", 0))
    slots = _Slots(artifact, list(committed.values()))
    new: list[ItemRef] = []
    for ref in refs:
        if not slots.claim(ref):
            new.append(ref)
            if not slots.left and len(new) == size:
                yield tuple(new), None
                new.clear()
    slots.settle(bool(new))
    yield from slots.to_try_again()
    for start in range(0, len(new), size):
        yield tuple(new[start : start + size]), None


class _Slots:
    """Rows of committed shards, each to be claimed by its item. ``left``: number of rows not claimed yet."""

    def __init__(self, artifact: Artifact, records: Sequence[ShardRecord]) -> None:
        self._artifact, self._records = artifact, records
        parts = [self._read(record) for record in records]
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        marks = np.concatenate(parts)
        self._order = np.argsort(marks, kind="stable")
        self._sorted = marks[self._order]
        self._free = np.ones(len(marks), dtype=bool)
        self._open = np.repeat([record.unresolved > 0 for record in records], np.diff(self._starts))
        self._refs: dict[int, ItemRef] = {}  # by row, for shards with rows to retry
        self.left = len(marks)

    def _read(self, record: ShardRecord) -> npt.NDArray[np.uint64]:
        name = items_file(record.shard)
        if name not in record.files:  # artifact of an earlier version of capipe
            raise self._changed(record.shard, "has other items now")
        return np.frombuffer(self._artifact.folder.read_bytes(name), ">u8").astype(np.uint64)

    def claim(self, ref: ItemRef) -> bool:
        """Assign the item to its row; False if it has none."""
        for identity in identities(ref):
            mark = np.uint64(int.from_bytes(_mark(identity), "big"))
            at = int(np.searchsorted(self._sorted, mark))
            while at < len(self._sorted) and self._sorted[at] == mark:
                slot = int(self._order[at])
                if self._free[slot]:
                    self._free[slot] = False
                    self.left -= 1
                    if self._open[slot]:
                        self._refs[slot] = ref
                    return True
                at += 1
        return False

    def settle(self, others: bool) -> None:
        """Handle the rows that no item has claimed, once all items are known. ``others``: there are new items."""
        for number, record in enumerate(self._records):
            free = np.flatnonzero(self._free[self._starts[number] : self._starts[number + 1]]).tolist()
            if not free:
                continue
            table = self._artifact.table(record.shard, ["status", "source"])
            rows = table.take(free).to_pylist()
            for at, row in zip(free, rows, strict=True):
                if row["status"] not in _UNREAD:
                    what = "has other items now" if others else "has fewer items now"
                    raise self._changed(record.shard, what, f" ({row['source']} is gone, or another one)")
                self._refs[int(self._starts[number]) + at] = GoneRef(row["source"])

    def to_try_again(self) -> Iterator[Found]:
        for number, record in enumerate(self._records):
            if record.unresolved:
                rows = range(self._starts[number], self._starts[number + 1])
                yield tuple(self._refs[row] for row in rows), record

    def _changed(self, shard: str, what: str, which: str = "") -> ArtifactMismatch:
        text = f"{self._artifact.url}: the source {what} than when shard {shard} was ingested{which}"
        return ArtifactMismatch(f"{text}; use another --out, or --fresh to start over")
