"""A task of the search: the near hashes that one table finds, among those whose keys fall in one part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ....manifests.artifact import Artifact
from ....manifests.manifest import ShardRecord
from ..arrays import U64
from ..search.near_hashes import near_of_table
from ..search.tables import BITS, Table, plan, sample_of, seconds
from .files import ROWS, Block, read_numbers, write_numbers
from .hash_values import HashValues, Kinds, are_compared

VALUES = "values"
VALUE_COLUMNS = pa.schema([("hash", pa.uint64()), ("kinds", pa.uint8())])
PAIR_COLUMNS = pa.schema([("left", pa.uint64()), ("right", pa.uint64()), ("dense", pa.bool_())])
PART = 1 << 25  # hashes per task: 600 MB while they are searched
_PER_TASK = 0.03  # seconds to read the hashes and to commit


@dataclass(frozen=True)
class TableTask:
    """A table, and which of the ``parts`` of its keys. ``name``: of the shard that holds the pairs."""

    name: str
    table: Table
    part: int
    parts: int
    radius: int


def write_values(values: HashValues, artifact: Artifact) -> ShardRecord:
    """Commit the hashes that all tasks read."""
    blocks: Iterator[Block] = (
        {"hash": values.hashes[start : start + ROWS], "kinds": values.kinds[start : start + ROWS]}
        for start in range(0, len(values), ROWS)
    )
    return write_numbers(artifact, VALUES, VALUE_COLUMNS, blocks)


def table_tasks(hashes: U64, radius: int) -> list[TableTask]:
    """The tasks that find all pairs of distinct ``hashes`` within ``radius``."""
    tables = plan(len(hashes), BITS, radius, sample_of(hashes), _PER_TASK)
    parts = max(1, math.ceil(len(hashes) / PART)) if tables[0].chosen else 1
    return [
        TableTask(f"table-{number:04}-{part:04}", table, part, parts, radius)
        for number, table in enumerate(tables)
        for part in range(parts)
    ]


def estimate(hashes: U64, radius: int) -> float:
    """Seconds of all tasks on one core."""
    return seconds(len(hashes), BITS, radius, sample_of(hashes), _PER_TASK)


def write_table(task: TableTask, artifact: Artifact) -> ShardRecord:
    """Search one part of a table; write and commit its pairs and dense runs."""
    hashes, kinds = _selected(task, artifact)
    return write_numbers(artifact, task.name, PAIR_COLUMNS, _found(task, hashes, kinds))


def _selected(task: TableTask, artifact: Artifact) -> tuple[U64, Kinds]:
    hashes, kinds = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint8)]
    for block, of_block in read_numbers(artifact, VALUES, VALUE_COLUMNS.names):
        mine = slice(None)
        if task.parts > 1:
            mine = task.table.part_of(block, task.parts) == task.part
        hashes.append(block[mine])
        kinds.append(of_block[mine])
    return np.concatenate(hashes), np.concatenate(kinds)


def _found(task: TableTask, hashes: U64, kinds: Kinds) -> Iterator[Block]:
    for left, right, dense in near_of_table(hashes, task.table, task.radius):
        if not dense:
            wanted = are_compared(*(kinds[np.searchsorted(hashes, side)] for side in (left, right)))
            left, right = left[wanted], right[wanted]
        if len(left):
            yield {"left": left, "right": right, "dense": np.full(len(left), dense)}
