"""Second pass over texts: those of all rows at once. Numbers are in memory, texts and keys in scratch files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ....errors import ArtifactMismatch
from ....manifests.artifact import Artifact
from ....manifests.schema import DEDUP, TEXTS, check
from ....manifests.status import Status
from ..arrays import U64, Bools, Indices
from .bands import SLOTS, Bands, Signatures
from .shingles import Shingles, shingles


@dataclass(frozen=True)
class TextSet:
    """Distinct texts, by digest, of the rows that are ok in the marks and have one.

    ``digests``: ``(texts,)``, 16 bytes, sorted; ``counts``: rows of each. ``rows``: text of each row of the shards, -1
    for none; ``uids``: of each row, 16 bytes; ``starts``: first row of each shard and the end; ``first``: a row
    of each text.
    """

    artifact: Artifact
    shards: tuple[str, ...]
    digests: npt.NDArray[np.bytes_]
    counts: Indices
    rows: Indices
    uids: npt.NDArray[np.bytes_]
    starts: Indices
    first: Indices

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def priority(self) -> Indices:
        """Position of each text in the order in which leaders are chosen: the most frequent first, then by digest."""
        priority = np.empty(len(self), dtype=np.int64)
        priority[np.lexsort((np.arange(len(self)), -self.counts))] = np.arange(len(self))
        return priority

    def rows_of(self, shard: int) -> slice:
        """Rows of a shard, by its position in ``shards``."""
        return slice(int(self.starts[shard]), int(self.starts[shard + 1]))

    def tables(self, column: str) -> Iterator[tuple[Indices, pa.Array]]:
        """Shard by shard the texts whose first row is there, and a column of these rows."""
        is_first = np.zeros(len(self.rows), dtype=bool)
        is_first[self.first] = True
        for number, shard in enumerate(self.shards):
            chosen = np.flatnonzero(is_first[self.rows_of(number)])
            column_of = self.artifact.table(shard, [column])[column].combine_chunks()
            yield self.rows[self.rows_of(number)][chosen], column_of.take(pa.array(chosen))


def read_text_set(texts: Artifact, marks: Artifact, shards: Sequence[str]) -> TextSet:
    """Read digests and uids. Raises ArtifactMismatch unless the marks are of the same rows."""
    parts = [_part(texts, marks, shard) for shard in shards]
    digests, uids, taken = (np.concatenate([part[k] for part in parts]) for k in range(3))
    distinct, first, inverse, counts = np.unique(
        digests[taken], return_index=True, return_inverse=True, return_counts=True
    )
    rows = np.full(len(taken), -1, dtype=np.int64)
    rows[taken] = inverse
    starts = np.cumsum([0, *(len(part[2]) for part in parts)])
    return TextSet(texts, tuple(shards), distinct, counts, rows, uids, starts, np.flatnonzero(taken)[first])


def _part(texts: Artifact, marks: Artifact, shard: str) -> tuple[npt.NDArray[np.bytes_], npt.NDArray[np.bytes_], Bools]:
    """Digests and uids of a shard's rows, and the mask of those that take part."""
    table, marked = _columns(texts, shard, TEXTS, "digest"), _columns(marks, shard, DEDUP, "status")
    if not all(table[name].equals(marked[name]) for name in ("key", "uid")):
        text = f"{texts.url}/{shard}.parquet: its rows are not those of {marks.url}, by key and uid"
        raise ArtifactMismatch(f"{text}; give captions and marks that were made of these --shards")
    taken = pc.and_(pc.is_valid(table["digest"]), pc.equal(marked["status"], str(Status.OK)))
    digests = pc.fill_null(table["digest"], pa.scalar(b"\0" * 16, pa.binary(16))).to_pylist()
    uids = [bytes.fromhex(uid) if uid else b"" for uid in table["uid"].to_pylist()]
    return np.array(digests, "S16"), np.array(uids, "S16"), np.asarray(taken.to_numpy(), dtype=bool)


def _columns(artifact: Artifact, shard: str, schema: pa.Schema, column: str) -> pa.Table:
    """Key, uid and another column. Raises ArtifactMismatch unless the file has the columns of ``schema``."""
    with artifact.parquet(shard) as parquet:
        check(parquet.schema_arrow, schema, f"{artifact.url}/{shard}.parquet")
        return parquet.read(columns=["key", "uid", column], use_threads=False)


def read_signatures(texts: TextSet, bands: Bands, scratch: Path) -> tuple[Signatures, U64]:
    """Signatures of all texts, and their keys by band, ``(bands, texts)``: scratch files in the folder ``scratch``."""
    count = max(1, len(texts))
    signatures: Signatures = np.memmap(scratch / "signatures", dtype=np.uint16, mode="w+", shape=(count, SLOTS))
    keys: U64 = np.memmap(scratch / "keys", dtype=np.uint64, mode="w+", shape=(bands.count, count))
    for chosen, column in texts.tables("signature"):
        if len(chosen):
            read = np.frombuffer(b"".join(column.to_pylist()), dtype="<u2").reshape(-1, SLOTS)
            signatures[chosen], keys[:, chosen] = read, bands.keys(read).T
    return np.asarray(signatures[: len(texts)]), np.asarray(keys[:, : len(texts)])


class TextFile:
    """Normalized texts of some of a set, in a scratch file, for reading in any order."""

    def __init__(self, texts: TextSet, wanted: Bools, scratch: BinaryIO) -> None:
        self._file = scratch
        self._starts, self._ends = (np.zeros(len(texts), dtype=np.int64) for _ in range(2))
        end = 0
        for chosen, column in texts.tables("text"):
            mine = wanted[chosen]
            for text, data in zip(chosen[mine].tolist(), column.filter(pa.array(mine)).to_pylist(), strict=True):
                encoded = data.encode()
                scratch.write(encoded)
                self._starts[text], end = end, end + len(encoded)
                self._ends[text] = end
        scratch.flush()

    def __call__(self, text: int) -> Shingles:
        """Shingles of a text."""
        start = int(self._starts[text])
        self._file.seek(start)
        return shingles(self._file.read(int(self._ends[text]) - start).decode())
