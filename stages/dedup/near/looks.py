"""A task that collects the signatures of candidates from the shards of hashes, ordered by the task that needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ....manifests.artifact import Artifact
from ....manifests.manifest import ShardRecord
from ..arrays import Indices
from ..hash_sets import signature_batches, signatures_of
from ..perceptual_hash import SIGNATURE_BYTES, Signatures
from .files import ROWS, Block, all_numbers, write_numbers
from .partition import NEEDED_COLUMNS

LOOK_COLUMNS = pa.schema([("task", pa.int64()), ("signature", pa.binary(SIGNATURE_BYTES))])


@dataclass(frozen=True)
class Source:
    """A shard of hashes, and the number of its first row among all."""

    artifact: Artifact
    shard: str
    first: int


@dataclass(frozen=True)
class LooksTask:
    """``needed``: shard that lists the rows; ``sources``: the shards that hold them, in order."""

    name: str
    needed: str
    sources: Sequence[Source]


def write_looks(task: LooksTask, artifact: Artifact) -> ShardRecord:
    """Write and commit the signatures, a row group for each task that needs some."""
    owner, row = all_numbers(artifact, task.needed, NEEDED_COLUMNS)
    rows, place = np.unique(row, return_inverse=True)
    signatures = read_signatures(task.sources, rows)
    return write_numbers(artifact, task.name, LOOK_COLUMNS, _by_owner(owner, signatures, place), rows=1)


def _by_owner(owner: Indices, signatures: Signatures, place: Indices) -> Iterator[Block]:
    for part in np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1):
        yield {"task": owner[part], "signature": signatures[place[part]]}


def read_signatures(sources: Sequence[Source], rows: Indices) -> Signatures:
    """Signatures of ``rows`` (ascending, distinct), ``(n, SIGNATURE_BYTES)``."""
    out: Signatures = np.empty((len(rows), SIGNATURE_BYTES), dtype=np.uint8)
    firsts = np.array([source.first for source in sources] + [np.iinfo(np.int64).max])
    limits = np.searchsorted(rows, firsts)
    for source, low, high in zip(sources, limits[:-1].tolist(), limits[1:].tolist(), strict=True):
        at = source.first
        for batch in signature_batches(source.artifact, source.shard) if low < high else ():
            end = low + int(np.searchsorted(rows[low:high], at + len(batch)))
            out[low:end] = batch[rows[low:end] - at]
            low, at = end, at + len(batch)
            if low == high:
                break
    return out


def read_looks(artifact: Artifact, shard: str, task: int, out: Signatures) -> int:
    """Read the signatures that a task needs of one file into ``out``; returns their number."""
    count = 0
    with artifact.parquet(shard) as file:
        for group in range(file.num_row_groups):
            if file.metadata.row_group(group).column(0).statistics.min == task:
                for batch in file.iter_batches(ROWS, [group], ["signature"], use_threads=False):
                    out[count : count + len(batch)] = signatures_of(batch.column(0))
                    count += len(batch)
    return count
