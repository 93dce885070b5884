"""A task that compares the vectors in some cells."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ....manifests.artifact import Artifact
from ....manifests.manifest import ShardRecord
from ..arrays import Indices
from ..near.files import write_numbers
from .backends import backend_of, unit
from .cells import CellRange
from .forest import Edges, Vectors, cosines, joined, maximum_forest, near_forest
from .part_tasks import members_of
from .raw_files import read_array

EDGE_COLUMNS = pa.schema([("left", pa.int64()), ("right", pa.int64()), ("cosine", pa.float64())])
_QUERIES, _OTHERS = 1024, 4096  # vectors compared at once: at most 4 million pairs, some 200 MB
_MANY = 1 << 20  # edges that are kept before they are thinned


@dataclass(frozen=True)
class CellTask:
    """``parts``: number of shards that hold the cells' vectors; ``files``: nodes from this number on are references."""

    name: str
    cells: CellRange
    parts: int
    width: int
    files: int
    cosine: float
    device: str


def write_edges(task: CellTask, artifact: Artifact) -> ShardRecord:
    """Compare; write and commit the maximum spanning forest of what is near, and each file's nearest reference."""
    with artifact.begin_files(f"{task.name}-vectors") as scratch:  # they may exceed memory
        codes, nodes, vectors = _members(task, artifact, str(scratch.path("all")))
        order = np.lexsort((nodes, codes))
        found = list[Edges]()
        for cell in range(task.cells.first, task.cells.last):
            low, middle, high = np.searchsorted(codes[order], [2 * cell, 2 * cell + 1, 2 * cell + 2]).tolist()
            if low < middle:
                found += _compare(task, nodes, vectors, order[low:middle], order[middle:high])
            if sum(map(len, found)) > _MANY:
                found = [thinned(joined(found), task.files)]
        edges = thinned(joined(found), task.files)
    block = {"left": edges.left, "right": edges.right, "cosine": edges.cosine}
    return write_numbers(artifact, task.name, EDGE_COLUMNS, [block])


def thinned(edges: Edges, files: int) -> Edges:
    """The edges that matter: a maximum spanning forest of the files, and each file's nearest reference, of equally near
    ones that with the lowest number. Edges with references have the file on the left."""
    matches = edges.take(edges.right >= files)
    matches = matches.take(np.lexsort((matches.right, -matches.cosine, matches.left)))
    first = np.diff(matches.left, prepend=-1) != 0
    return joined([maximum_forest(edges.take(edges.right < files)), matches.take(first)])


def _members(task: CellTask, artifact: Artifact, scratch: str) -> tuple[Indices, Indices, Vectors]:
    """Codes, nodes and vectors of all entries of the cells."""
    low, high = 2 * task.cells.first, 2 * task.cells.last
    shards = [members_of(number) for number in range(task.parts)]
    starts = [read_array(artifact, shard, "starts", np.int64, low, high - low + 1) for shard in shards]
    total = sum(int(of_shard[-1] - of_shard[0]) for of_shard in starts)
    vectors: Vectors = np.memmap(scratch, dtype=np.float16, mode="w+", shape=(max(total, 1), task.width))
    codes, nodes, at = np.empty(total, np.int64), np.empty(total, np.int64), 0
    for shard, of_shard in zip(shards, starts, strict=True):
        first, count = int(of_shard[0]), int(of_shard[-1] - of_shard[0])
        into = slice(at, at + count)
        codes[into] = np.repeat(np.arange(low, high), np.diff(of_shard))
        nodes[into] = read_array(artifact, shard, "nodes", np.int64, first, count)
        data = read_array(artifact, shard, "vectors", np.float16, first * task.width, count * task.width)
        vectors[into] = data.reshape(count, task.width)
        at += count
    return codes, nodes, vectors


def _compare(task: CellTask, nodes: Indices, vectors: Vectors, living: Indices, visiting: Indices) -> Iterator[Edges]:
    """Edges of one cell; ``living`` and ``visiting``: positions of its members, in the order of nodes."""
    first = _first_equal(task, nodes, vectors, living)
    if task.cells.part == 0:
        copies = (first != living) & (nodes[living] < task.files)
        yield _verified(nodes, vectors, first[copies], living[copies])
    living = living[first == living]
    visiting = visiting[_first_equal(task, nodes, vectors, visiting) == visiting]
    members = np.concatenate([living, visiting])
    for number, start in enumerate(range(0, len(living), _QUERIES)):
        if number % task.cells.parts == task.cells.part:
            queries = living[start : start + _QUERIES]
            for begin in range(start, len(members), _OTHERS):
                yield from _block(task, nodes, vectors, queries, members[begin : begin + _OTHERS], begin - start)


def _block(
    task: CellTask, nodes: Indices, vectors: Vectors, queries: Indices, others: Indices, offset: int
) -> Iterator[Edges]:
    """Edges between members ``queries`` of a cell and ``others``, ``offset`` places after the first query."""
    backend = backend_of(task.device)
    rounding = backend.rounding(task.width)
    row, column, similar = backend.above(unit(vectors[queries]), unit(vectors[others]), task.cosine - rounding)
    later = column + offset > row
    a, b, similar = queries[row[later]], others[column[later]], similar[later]
    files = nodes[a] < task.files, nodes[b] < task.files
    both, one = files[0] & files[1] & (nodes[a] != nodes[b]), files[0] != files[1]
    if both.any():
        yield _named(nodes, near_forest(vectors, a[both], b[both], similar[both], task.cosine, rounding))
    if one.any():
        file, reference = np.where(files[0], a, b)[one], np.where(files[0], b, a)[one]
        distinct, place = np.unique(file, return_inverse=True)
        nearest = np.full(len(distinct), -np.inf, dtype=np.float32)
        np.maximum.at(nearest, place, similar[one])
        likely = similar[one] >= nearest[place] - 2 * rounding
        yield _verified(nodes, vectors, file[likely], reference[likely]).reaching(task.cosine)


def _verified(nodes: Indices, vectors: Vectors, a: Indices, b: Indices) -> Edges:
    return _named(nodes, Edges(a, b, cosines(vectors, a, b)))


def _named(nodes: Indices, edges: Edges) -> Edges:
    """Edges between nodes, from edges between positions; the lower node, hence a file, on the left."""
    left, right = nodes[edges.left], nodes[edges.right]
    return Edges(np.minimum(left, right), np.maximum(left, right), edges.cosine)


def _first_equal(task: CellTask, nodes: Indices, vectors: Vectors, members: Indices) -> Indices:
    """For each member the first one with the same vector, of files and of references alike."""
    keys = [
        hashlib.blake2b(memoryview(vectors[member]), digest_size=15).digest() + bytes([node < task.files])
        for member, node in zip(members.tolist(), nodes[members].tolist(), strict=True)
    ]
    _, first, inverse = np.unique(np.array(keys, dtype="V16"), return_index=True, return_inverse=True)
    return members[first[inverse]]
