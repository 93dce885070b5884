"""The search for near embeddings, as steps of tasks that any runner of pool jobs can serve (see ``near/work.py``).

Rows are read and some vectors kept for k-means; centroids; each part's vectors written by cell; cells compared. What it
found is kept beside the hashes, so that a higher threshold, or another choice of keepers, needs no search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....manifests.artifact import Artifact
from ..arrays import NONE, Floats, Indices
from ..hash_sets import HashSet
from ..near.files import Block, all_numbers, write_numbers
from ..steps import Step, step
from . import cells
from .backends import FAISS
from .cell_task import EDGE_COLUMNS, CellTask, thinned, write_edges
from .forest import Edges, joined
from .part_tasks import (
    CENTROIDS,
    ROW_COLUMNS,
    SIMILAR_COLUMNS,
    CentroidsTask,
    PartTask,
    members_of,
    rows_of,
    seen_of,
    write_centroids,
    write_members,
    write_seen,
)
from .raw_files import read_array
from .reading import PART_BYTES, ReferenceVectors, ShardGroup, parts_of_files, parts_of_references

STAGE = "near-embeddings"
FOUND, SIMILAR = "found", "similar"
_OPERATIONS = 1e11  # per second and core: a guess
_READ = 100_000  # vectors per second
_PER_GPU = 4  # processes
_MANY = 1 << 22  # edges that are kept before they are thinned


@dataclass(frozen=True)
class NearFiles:
    """What a search found. ``edges``: maximum spanning forest of the files; ``matches``: each file's nearest reference,
    on the right, numbered from 0; ``similar``: cosine of each file with the centroid of its cell, NaN without vector.
    """

    edges: Edges
    matches: Edges
    similar: Floats

    def reaching(self, cosine: float) -> NearFiles:
        """What a search at a higher threshold would find."""
        return NearFiles(self.edges.reaching(cosine), self.matches.reaching(cosine), self.similar)


class EmbeddingSearch:
    """The search among the embeddings of files, and between them and references.

    ``devices``: see :func:`.backends.backend_of`; tasks take turns on them.
    """

    def __init__(
        self,
        hashed: HashSet,
        embeddings: Artifact,
        references: ReferenceVectors | None,
        width: int,
        cosine: float,
        devices: Sequence[str],
    ) -> None:
        self._files, self._width, self._cosine, self._devices = len(hashed.contents), width, cosine, tuple(devices)
        self._parts = parts_of_files(embeddings, hashed, width)
        self._of_files = len(self._parts)
        if references is not None:
            self._parts += parts_of_references(references, width, self._of_files, self._files)

    @property
    def config(self) -> dict[str, Any]:
        """What results depend on beside the embeddings; the threshold alone decides no pair above a higher one."""
        sizes = [cells.cell_count(self._files), cells.seen_count(self._files), cells.PROBES, cells.REACH, cells.WORK]
        return {"cosine": self._cosine, "cells": sizes, "width": self._width, "part": PART_BYTES}

    def steps(self, artifact: Artifact) -> Iterator[Step]:
        """The steps in order. The tasks of one must be committed before the next is asked for."""
        committed, most = artifact.committed(), self._processes
        for part, nodes in self._parts:
            if rows_of(part.number) not in committed:
                write_numbers(artifact, rows_of(part.number), ROW_COLUMNS, [{"node": nodes}])
        parts, rows = [part for part, _ in self._parts], sum(len(nodes) for _, nodes in self._parts)
        seen = [self._of_part(seen_of(part.number), part) for part in parts]
        yield step("parts of embeddings read", seen, write_seen, rows / _READ, artifact)
        count = cells.cell_count(self._files)
        of_files = tuple(task.name for task in seen[: self._of_files])
        centroids = CentroidsTask(CENTROIDS, of_files, self._width, self._files, self._devices[0])
        operations = 20.0 * self._width * count * (cells.seen_count(self._files) if count > 1 else 1)
        yield step("centroids", [centroids], write_centroids, operations / _OPERATIONS, artifact, most)
        members = [self._of_part(members_of(part.number), part) for part in parts]
        operations = 2.0 * self._width * count * rows
        seconds = operations / _OPERATIONS + rows / _READ
        yield step("parts of embeddings put in cells", members, write_members, seconds, artifact, most)
        counts = self._counts(artifact)
        work = 2.0 * self._width * float((counts[0::2] * (counts[0::2] + counts[1::2])).sum())
        compared = [self._of_cells(*numbered) for numbered in enumerate(self._divided(counts))]
        yield step("cells of embeddings compared", compared, write_edges, work / _OPERATIONS, artifact, most)

    def result(self, artifact: Artifact) -> NearFiles:
        """What the tasks found, together."""
        parts = list[Edges]()
        for number, _ in enumerate(self._divided(self._counts(artifact))):
            parts.append(Edges(*all_numbers(artifact, edges_of(number), EDGE_COLUMNS)))
            if sum(map(len, parts)) > _MANY + 2 * len(parts[0]):
                parts = [thinned(joined(parts), self._files)]
        return _near_files(thinned(joined(parts), self._files), self._similar(artifact))

    @property
    def _processes(self) -> int | None:
        return None if self._devices == (FAISS,) else _PER_GPU * len(self._devices)

    def _divided(self, counts: Indices) -> Iterator[cells.CellRange]:
        return cells.divide(counts, max(1, PART_BYTES // (2 * self._width)))

    def _similar(self, artifact: Artifact) -> Floats:
        similar: Floats = np.full(self._files, np.nan, dtype=np.float32)
        for part, _ in self._parts[: self._of_files]:
            nodes, values = all_numbers(artifact, members_of(part.number), SIMILAR_COLUMNS)
            similar[nodes] = np.fmin(similar[nodes], values)  # of equal files in two parts: in any order of the parts
        return similar

    def _counts(self, artifact: Artifact) -> Indices:
        """Entries of all parts by code."""
        total: Indices = NONE
        for part, _ in self._parts:
            counts = np.diff(read_array(artifact, members_of(part.number), "starts", np.int64))
            total = counts if not len(total) else total + counts
        return total

    def _of_part(self, name: str, part: ShardGroup) -> PartTask:
        return PartTask(name, part, self._files, self._devices[part.number % len(self._devices)])

    def _of_cells(self, number: int, chosen: cells.CellRange) -> CellTask:
        device = self._devices[number % len(self._devices)]
        name, parts = edges_of(number), len(self._parts)
        return CellTask(name, chosen, parts, self._width, self._files, self._cosine, device)


def edges_of(task: int) -> str:
    """Shard with what a task found."""
    return f"edges-{task:06}"


def _near_files(edges: Edges, similar: Floats) -> NearFiles:
    matches = edges.right >= len(similar)
    of_references = edges.take(matches)
    matched = Edges(of_references.left, of_references.right - len(similar), of_references.cosine)
    return NearFiles(edges.take(~matches), matched, similar)


def write_found(near: NearFiles, artifact: Artifact) -> None:
    """Commit what a search found, in two shards."""
    files, known = len(near.similar), np.flatnonzero(~np.isnan(near.similar))
    edges = joined([near.edges, Edges(near.matches.left, near.matches.right + files, near.matches.cosine)])
    block: Block = {"left": edges.left, "right": edges.right, "cosine": edges.cosine}
    committed = artifact.committed()
    if FOUND not in committed:
        write_numbers(artifact, FOUND, EDGE_COLUMNS, [block])
    if SIMILAR not in committed:
        write_numbers(artifact, SIMILAR, SIMILAR_COLUMNS, [{"node": known, "similar": near.similar[known]}])


def read_found(artifact: Artifact, files: int) -> NearFiles | None:
    """What a search found among so many files, None if it is not all there."""
    if not {FOUND, SIMILAR} <= artifact.committed().keys():
        return None
    node, values = all_numbers(artifact, SIMILAR, SIMILAR_COLUMNS)
    similar: Floats = np.full(files, np.nan, dtype=np.float32)
    similar[node] = values
    return _near_files(Edges(*all_numbers(artifact, FOUND, EDGE_COLUMNS)), similar)
