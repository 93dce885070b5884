"""Sidecars of a shard: a Parquet of another artifact with a row for each of its rows, in their order.

Those of most artifacts are a file for each shard. A selection packs the rows of several input shards into each of its
own: there the sidecar of an input shard is those rows of a file that name it as their source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import DamagedShard
from ..artifact import Artifact
from ..files.outside import is_url
from ..files.storage import expecting, open_parquet, parquet_of
from ..files.store_errors import StoreUnavailable
from ..files.stores import filesystem
from ..schema import EMBEDDING_COLUMN

SELECTION = "select"  # stage of artifacts whose shards are made of several input shards
_SOURCE = ("key", "source_shard", "source_key")  # their columns of a row and its origin
_BATCH = 1000
Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


@dataclass(frozen=True)
class Companion:
    """A sidecar's Parquet for one shard, read along with it: same rows, same order.

    ``rows``: row count by its manifest. ``replaces``: sha256 of its earlier versions, before some rows were redone.
    ``part``: only the rows of this input shard, under their keys there; None for all rows. ``copy``: a local copy of
    one in a store, "" without.
    """

    name: str
    url: str
    sha256: str
    rows: int
    replaces: tuple[str, ...] = ()
    part: str | None = None
    copy: str = ""

    def open(self) -> pq.ParquetFile:
        """The file, not read; its checksum is not compared. Raises ArtifactMismatch if it has other rows, OSError."""
        return expecting(open_parquet(self.copy or self.url), self.rows, self.url)

    def read(self) -> bytes:
        """The file's bytes. Raises ArtifactMismatch if they are not the committed ones, StoreUnavailable."""
        fs, path = filesystem(self.copy or self.url)
        try:
            data = fs.read(path)
        except StoreUnavailable:
            raise
        except OSError as error:
            text = f"{self.url}: cannot be read ({error}); restore it, or run its stage again with --fresh"
            raise DamagedShard(text) from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            text = f"{self.url}: its bytes are not those its manifest lists; `capipe verify` says what is wrong"
            raise DamagedShard(text)
        return data

    def copied(self, folder: Path, file: str) -> Companion:
        """The same, to be read several times: one in a store is copied to ``folder``."""
        if not is_url(self.url):
            return self
        (folder / file).write_bytes(self.read())
        return replace(self, copy=str(folder / file))

    def table(self, parquet: pq.ParquetFile, columns: Sequence[str]) -> pa.Table:
        """Some columns of the sidecar in its opened file."""
        return self._own(parquet.read(columns=self._needed(columns), use_threads=False)).select(list(columns))

    def statuses(self) -> list[str]:
        """The status of each row. Raises as :meth:`open`."""
        with self.open() as parquet:
            statuses: list[str] = self.table(parquet, ["status"]).column("status").to_pylist()
        return statuses

    def first(self) -> tuple[str, str | None] | None:
        """Key and uid of its first row, None if it has no row; its checksum is not compared. Raises as :meth:`open`."""
        columns = ["key", "uid"]
        with self.open() as parquet:
            for batch in parquet.iter_batches(_BATCH, columns=self._needed(columns), use_threads=False):
                for row in self._own(batch).slice(0, 1).to_pylist():
                    return row["key"], row["uid"]
        return None

    def _needed(self, columns: Sequence[str]) -> list[str]:
        return list(dict.fromkeys([*columns, *(() if self.part is None else _SOURCE)]))

    def _own(self, rows: Rows) -> Rows:
        if self.part is None:
            return rows
        own = rows.filter(pc.equal(rows.column("source_shard"), self.part))
        return own.set_column(own.schema.get_field_index("key"), "key", own.column("source_key"))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Its rows, in order. Raises ArtifactMismatch if they are not the committed ones."""
        with expecting(parquet_of(self.read()), self.rows, self.url) as parquet:
            for batch in parquet.iter_batches(_BATCH, use_threads=False):
                yield from _rows(self._own(batch))


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries. Embeddings are arrays of numpy: as lists of Python's numbers they take 20 times as long."""
    position = batch.schema.get_field_index(EMBEDDING_COLUMN)
    if position < 0 or not pa.types.is_fixed_size_list(batch.schema.field(position).type):
        yield from batch.to_pylist()
        return
    column = batch.column(position)
    numbers = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    vectors = iter(numbers)
    for row, there in zip(batch.drop_columns([EMBEDDING_COLUMN]).to_pylist(), column.is_valid(), strict=True):
        yield {**row, EMBEDDING_COLUMN: next(vectors) if there.as_py() else None}


def companions_of(name: str, artifact: Artifact) -> Mapping[str, Companion]:
    """An artifact's sidecars, by the input shard that they are of."""
    found = {}
    for shard, record in artifact.committed().items():
        file = f"{shard}.parquet"
        whole = (name, f"{artifact.url}/{file}", str(record.files[file]["sha256"]), record.count, record.replaces)
        if artifact.stage != SELECTION:
            found[shard] = Companion(*whole)
            continue
        for entry in record.input["shards"]:
            found[entry["name"]] = Companion(*whole, entry["name"])
    return found
