"""Intermediate results: Parquet tables of numbers, each committed as a shard of a working artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ....manifests.artifact import Artifact
from ....manifests.manifest import ShardRecord
from ....manifests.status import Status
from ..perceptual_hash import SIGNATURE_BYTES, Signatures

ROWS = 1 << 18  # per row group, and per block that is read: a few MB

Block = Mapping[str, npt.NDArray[Any]]


def write_numbers(
    artifact: Artifact,
    shard: str,
    schema: pa.Schema,
    blocks: Iterable[Block],
    *,
    rows: int = ROWS,
    stats: Mapping[str, Any] | None = None,
) -> ShardRecord:
    """Write and commit a shard from blocks of columns; signatures are ``(n, SIGNATURE_BYTES)``.

    ``rows``: least number of rows per row group, but for the last.
    """
    total, waiting, parts = 0, 0, list[Block]()
    with artifact.begin_files(shard) as out:
        with (
            out.writing(f"{shard}.parquet") as file,
            pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer,
        ):
            for block in blocks:
                parts.append(block)
                waiting += len(block[schema.names[0]])
                if waiting >= rows:
                    writer.write_table(_table(parts, schema))
                    total, waiting, parts = total + waiting, 0, []
            if waiting:
                writer.write_table(_table(parts, schema))
        return out.commit(
            rows={Status.OK: total + waiting}, input_info={"digest": artifact.fingerprint}, stats=dict(stats or {})
        )


def read_numbers(artifact: Artifact, shard: str, columns: Sequence[str]) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """Blocks of a shard's columns."""
    with artifact.parquet(shard) as file:
        for batch in file.iter_batches(ROWS, columns=list(columns), use_threads=False):
            yield tuple(batch.column(name).to_numpy(zero_copy_only=False) for name in columns)


def all_numbers(artifact: Artifact, shard: str, schema: pa.Schema) -> tuple[npt.NDArray[Any], ...]:
    """A shard's columns as a whole."""
    table = artifact.table(shard, schema.names)
    return tuple(table[field.name].to_numpy() for field in schema)


def _signature_column(signatures: Signatures) -> pa.Array:
    """Signatures ``(n, SIGNATURE_BYTES)`` as a column, without a copy."""
    data = pa.py_buffer(np.ascontiguousarray(signatures))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(SIGNATURE_BYTES), len(signatures), [None, data])


def _table(blocks: Sequence[Block], schema: pa.Schema) -> pa.Table:
    columns = [_column([block[field.name] for block in blocks], field.type) for field in schema]
    return pa.table(columns, schema=schema)


def _column(parts: list[npt.NDArray[Any]], kind: pa.DataType) -> pa.Array:
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return _signature_column(whole) if whole.ndim > 1 else pa.array(whole, type=kind)
