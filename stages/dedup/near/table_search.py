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

VALUES = "values"
VALUE_COLUMNS = pa.schema([("hash", pa.uint64())])
PAIR_COLUMNS = pa.schema([("left", pa.uint64()), ("right", pa.uint64()), ("dense", pa.bool_())])
PART = 1 << 25  # hashes per task: 500 MB while they are searched
_PER_TASK = 0.03  # seconds to read the hashes and to commit


@dataclass(frozen=True)
class TableTask:
    """A table, and which of the ``parts`` of its keys. ``name``: of the shard that holds the pairs."""

    name: str
    table: Table
    part: int
    parts: int
    radius: int


def write_values(hashes: U64, artifact: Artifact) -> ShardRecord:
    """Commit the hashes that all tasks read."""
    blocks: Iterator[Block] = ({"hash": hashes[start : start + ROWS]} for start in range(0, len(hashes), ROWS))
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
    found = near_of_table(_selected(task, artifact), task.table, task.radius, in_place=True)
    blocks: Iterator[Block] = (
        {"left": left, "right": right, "dense": np.full(len(left), dense)} for left, right, dense in found if len(left)
    )
    return write_numbers(artifact, task.name, PAIR_COLUMNS, blocks)


def _selected(task: TableTask, artifact: Artifact) -> U64:
    """The hashes whose keys fall in the part."""
    hashes = np.empty(artifact.committed()[VALUES].count, dtype=np.uint64)
    count = 0
    for (block,) in read_numbers(artifact, VALUES, VALUE_COLUMNS.names):
        mine = block if task.parts == 1 else block[task.table.part_of(block, task.parts) == task.part]
        hashes[count : count + len(mine)] = mine
        count += len(mine)
    return hashes[:count]
