"""Rows of withdrawn images: key and uid stay, with the status; everything that came with the image goes.

A row is withdrawn if its uid is on the list of the artifact that is written, or if it is withdrawn in an input: in the
shards, or in a sidecar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schema import SOURCE_UID
from ..shards import InputShard, Row, RowReader
from ..status import Status
from .uid_set import EMPTY, UidSet

REASON = "its uid is on a list of withdrawn images (--drop)"
KEPT = frozenset(
    {"key", "uid", "status", "error", "source_shard", "source_key", SOURCE_UID}
)  # columns of a withdrawn row


class WithdrawingReader:
    """A :class:`RowReader` whose withdrawn rows have no image, text or metadata, nor have their rows of sidecars."""

    def __init__(self, shard: InputShard, uids: UidSet = EMPTY) -> None:
        self._reader, self._uids = RowReader(shard), uids

    @property
    def info(self) -> dict[str, Any]:
        """As :attr:`RowReader.info`."""
        return self._reader.info

    def __iter__(self) -> Iterator[Row]:
        for row in self._reader:
            gone = row.status is Status.WITHDRAWN or is_withdrawn(row.uid, row.beside.values(), self._uids)
            yield emptied(row) if gone else row


def is_withdrawn(uid: str | None, rows: Iterable[Mapping[str, Any]], uids: UidSet) -> bool:
    """True if an image is on the list, or withdrawn in one of its ``rows``."""
    return uid in uids or any(row["status"] == Status.WITHDRAWN for row in rows)


def emptied(row: Row) -> Row:
    """A withdrawn row as stages get it."""
    beside = {name: _emptied_beside(other) for name, other in row.beside.items()}
    return Row(row.index, row.key, row.uid, Status.WITHDRAWN, REASON, beside=beside)


def _emptied_beside(row: Mapping[str, Any]) -> dict[str, Any]:
    """Lists become empty, which readers of sidecars expect of rows without a result."""
    return {**blank(row), **{name: [] for name, value in row.items() if isinstance(value, list)}}


def blank(row: Mapping[str, Any]) -> dict[str, Any]:
    """A withdrawn row of an artifact: null but for its identity."""
    own = {name: value for name, value in row.items() if name in KEPT}
    return {**dict.fromkeys(row), **own, "status": str(Status.WITHDRAWN), "error": REASON}


def without(batch: pa.RecordBatch, uids: UidSet) -> pa.RecordBatch:
    """Rows of an artifact, those of ``uids`` as :func:`blank` makes them."""
    gone = uids.mask(batch.column("uid"))
    if not gone.any():
        return batch
    mask, rows = pa.array(gone), pa.array(np.arange(len(batch)), mask=gone)
    said = {"status": str(Status.WITHDRAWN), "error": REASON}
    columns = []
    for field in batch.schema:
        column = batch.column(field.name)
        if field.name in said:
            column = pc.if_else(mask, pa.scalar(said[field.name], field.type), column)
        elif field.name not in KEPT:
            column = column.take(rows)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)
