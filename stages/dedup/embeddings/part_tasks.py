"""Tasks over the parts of the embeddings: vectors for k-means, the centroids, and the vectors of a part by cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ....manifests.artifact import Artifact
from ....manifests.manifest import ShardRecord
from ..arrays import NONE, Floats, Indices
from ..near.files import all_numbers
from .backends import backend_of, unit
from .cells import assign, cell_count, is_seen
from .forest import Vectors
from .raw_files import Arrays, read_array, write_arrays
from .reading import ShardGroup, read_part

CENTROIDS = "centroids"
ROW_COLUMNS = pa.schema([("node", pa.int64())])
CELL_COLUMNS = pa.schema([("cell", pa.int64())])
SIMILAR_COLUMNS = pa.schema([("node", pa.int64()), ("similar", pa.float32())])  # with the centroid of its cell
_BLOCK = 1 << 14  # vectors copied at once


@dataclass(frozen=True)
class PartTask:
    """``name``: of the shard to write; ``files``: number of files; ``device``: see :func:`.backends.backend_of`."""

    name: str
    part: ShardGroup
    files: int
    device: str


@dataclass(frozen=True)
class CentroidsTask:
    """``seen``: shards with the vectors for k-means."""

    name: str
    seen: tuple[str, ...]
    width: int
    files: int
    device: str


def rows_of(part: int) -> str:
    """Shard with the node of each row of a part."""
    return f"rows-{part:06}"


def seen_of(part: int) -> str:
    """Shard with a part's vectors for k-means."""
    return f"seen-{part:06}"


def members_of(part: int) -> str:
    """Shard with a part's vectors by cell."""
    return f"members-{part:06}"


def write_seen(task: PartTask, artifact: Artifact) -> ShardRecord:
    """Read a part, check its rows, and keep the vectors that k-means sees."""
    nodes, vectors = _read(task, artifact)
    seen = is_seen(nodes, task.files)
    columns = pa.table([nodes[seen]], schema=ROW_COLUMNS)
    return write_arrays(artifact, task.name, columns, {"vectors": [vectors[seen]]})


def write_centroids(task: CentroidsTask, artifact: Artifact) -> ShardRecord:
    """k-means over all vectors that it sees, in the order of files: that of shards does not matter."""
    nodes = np.concatenate([NONE, *(all_numbers(artifact, name, ROW_COLUMNS)[0] for name in task.seen)])
    vectors: Vectors = np.concatenate(
        [np.empty(0, np.float16), *(read_array(artifact, name, "vectors", np.float16) for name in task.seen)]
    ).reshape(-1, task.width)
    _, first = np.unique(nodes, return_index=True)
    if len(first):
        centroids = backend_of(task.device).centroids(unit(vectors[first]), cell_count(task.files))
    else:  # no vector is usable, or none of those seen: all go into one cell
        centroids = np.zeros((1, task.width), dtype=np.float32)
    columns = pa.table([np.arange(len(centroids))], schema=CELL_COLUMNS)
    return write_arrays(artifact, task.name, columns, {CENTROIDS: [centroids]})


def read_centroids(artifact: Artifact, width: int) -> Floats:
    """The centroids, ``(cells, width)``."""
    return read_array(artifact, CENTROIDS, CENTROIDS, np.float32).reshape(-1, width).copy()  # torch wants it writable


def write_members(task: PartTask, artifact: Artifact) -> ShardRecord:
    """Write a part's vectors cell by cell, once for each cell that they are in; the nodes and the first entry of each
    code (see :class:`.cells.Entries`) likewise; and the cosine of each node with its centroid."""
    nodes, vectors = _read(task, artifact)
    entries = assign(vectors, read_centroids(artifact, task.part.width), backend_of(task.device))

    def copied() -> Iterator[Vectors]:
        for start in range(0, len(entries.rows), _BLOCK):
            yield vectors[entries.rows[start : start + _BLOCK]]

    arrays: Arrays = {
        "vectors": copied(),
        "nodes": [nodes[entries.rows]],
        "starts": [entries.starts],
    }
    columns = pa.table([nodes, entries.similar], schema=SIMILAR_COLUMNS)
    return write_arrays(artifact, task.name, columns, arrays)


def _read(task: PartTask, artifact: Artifact) -> tuple[Indices, Vectors]:
    (nodes,) = all_numbers(artifact, rows_of(task.part.number), ROW_COLUMNS)
    return read_part(task.part, nodes)
