"""Cells: which vectors are compared with which.

Each vector lives in the cell of its nearest centroid and visits others: at most :data:`PROBES` cells in all, and only
those whose border with its own is near (an inverted file with several probes, as faiss's ``nprobe``, but as many probes
as needed). Vectors are compared in each cell that one of them lives in and the other lives in or visits. None of it
depends on the threshold: a search at a higher one compares the same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arrays import Floats, Indices
from .backends import Backend, unit
from .forest import Vectors

ALL_UP_TO = 50_000  # vectors compared all with all: one cell
PROBES = 12
REACH = 0.1  # visited are cells whose border is this near, for a vector of length 1
PER_CENTROID = 64  # vectors that k-means sees
MOST_SEEN = 1 << 19  # and of all: 1 GB of 512 numbers each
LEAST_SEEN = 4096
WORK = 1 << 34  # pairs per task: minutes of a core
_BLOCK = 4096


def cell_count(files: int) -> int:
    """Cells for so many files: assigning vectors and comparing them then cost about the same, n ** 1.5 each."""
    return 1 if files <= ALL_UP_TO else 2 * math.isqrt(files)


def seen_count(files: int) -> int:
    """Files whose vectors k-means sees."""
    return min(files, MOST_SEEN, max(LEAST_SEEN, PER_CENTROID * cell_count(files)))


def is_seen(nodes: Indices, files: int) -> npt.NDArray[np.bool_]:
    """Whether k-means sees these files: evenly many of all, which are sorted by uid and hence random."""
    chosen = np.linspace(0, files - 1, seen_count(files)).astype(np.int64)
    return np.isin(nodes, chosen)


@dataclass(frozen=True)
class Entries:
    """Who is in which cell. ``rows``: positions of the vectors; ``codes``: twice the cell, and 1 more for visitors;
    ordered by code, then by row. ``starts``: first entry of each code, and their number. ``similar``: cosine of each
    vector with the centroid of its own cell."""

    rows: Indices
    starts: Indices
    similar: Floats


def assign(vectors: Vectors, centroids: Floats, backend: Backend) -> Entries:
    """The cells of some vectors. ``centroids``: unit vectors, ``(cells, width)``."""
    probes = min(PROBES, len(centroids))
    codes, rows, similar = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)], [np.empty(0, np.float32)]
    for start in range(0, len(vectors), _BLOCK):
        nearness, cells = backend.nearest(unit(vectors[start : start + _BLOCK]), centroids, probes)
        near = centroids[cells]
        apart = np.linalg.norm(near - near[:, :1], axis=2)
        entered = nearness[:, :1] - nearness <= REACH * apart  # the distance to the plane between two centroids
        entered[:, 0] = True
        row, probe = np.nonzero(entered)
        codes.append(2 * cells[row, probe].astype(np.int64) + (probe > 0))
        rows.append(start + row)
        similar.append(nearness[:, 0])
    code, order = np.concatenate(codes), np.concatenate(rows)
    by_code = np.lexsort((order, code))
    starts = np.searchsorted(code[by_code], np.arange(2 * len(centroids) + 1))
    return Entries(order[by_code], starts, np.concatenate(similar))


@dataclass(frozen=True)
class CellRange:
    """Cells ``first`` to ``last``, or one of the ``parts`` of the work in a single one."""

    first: int
    last: int
    part: int
    parts: int


def divide(counts: Indices, most: int) -> Iterator[CellRange]:
    """Ranges of cells for a task each. ``counts``: entries by code; ``most``: entries that a task may hold at once.

    A large cell is a range of its own, whose parts are tasks that each read all of it.
    """
    living, visiting = counts[0::2], counts[1::2]
    work = living * (living + visiting)
    first, held, done = 0, 0, 0
    for cell, (members, pairs) in enumerate(zip((living + visiting).tolist(), work.tolist(), strict=True)):
        if first < cell and (held + members > most or done + pairs > WORK):
            yield CellRange(first, cell, 0, 1)
            first, held, done = cell, 0, 0
        held, done = held + members, done + pairs
        if pairs > WORK:
            parts = math.ceil(pairs / WORK)
            yield from (CellRange(cell, cell + 1, part, parts) for part in range(parts))
            first, held, done = cell + 1, 0, 0
    if first < len(living):
        yield CellRange(first, len(living), 0, 1)
