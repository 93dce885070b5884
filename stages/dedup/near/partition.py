"""Candidates divided among the tasks that confirm them, and the signatures that each task needs.

Images that candidates connect go to one task, so that what is joined there already is not confirmed again; only a
component that is too large for one task is divided. The pairs of all tables are read as a stream, several times if they
are too many for memory; what is kept of each hash is some 50 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ....manifests.artifact import Artifact
from ..arrays import NONE, Bools, Indices
from ..groups import Components
from .files import read_numbers, write_numbers
from .hash_values import HashValues, are_compared
from .table_search import PAIR_COLUMNS

PLAN = "plan"
PLAN_COLUMNS = pa.schema([("task", pa.int64()), ("looks", pa.int64())])  # which files of signatures a task needs
MEMBER_COLUMNS = pa.schema(
    [
        ("value", pa.int64()),  # number of the hash within the task, in ascending order
        ("hash", pa.uint64()),
        ("own", pa.bool_()),  # whether images with this hash are compared with each other in this task
        ("cluster", pa.int64()),  # dense cluster of the hash, -1 for none
        ("node", pa.int64()),
        ("kinds", pa.uint8()),
        ("row", pa.int64()),  # of the node's signature: rows of the hashes, then of the references
    ]
)
CANDIDATE_COLUMNS = pa.schema([("left", pa.int64()), ("right", pa.int64())])  # hashes, by ``value``
NEEDED_COLUMNS = pa.schema([("task", pa.int64()), ("row", pa.int64())])

WORK = 1 << 18  # pairs and images per task; twice as many at most, unless a cluster is dense
PAIRS_IN_MEMORY = 1 << 24
LOOKS = 1 << 15  # signatures per file: 200 MB


def divide(values: HashValues, tables: Sequence[str], rows: Indices, artifact: Artifact) -> None:
    """Commit the members and candidates of each task, the list of signatures in each file, and the plan.

    ``tables``: shards of pairs; ``rows``: row of each node's signature.
    """
    found = _Found.read(values, tables, artifact)
    needed = [(NONE, NONE)]
    for number, task in enumerate(_tasks(found)):
        task.write(number, rows, artifact)
        own = np.unique(rows[task.nodes()])
        needed.append((np.full(len(own), number), own))
    tasks, of_tasks = (np.concatenate([part[side] for part in needed]) for side in (0, 1))
    _write_looks(tasks, of_tasks, artifact)


@dataclass(frozen=True)
class _Found:
    """What the tables found. Hashes are given by their positions in ``values``.

    ``active``: those with any candidates, ordered by component; ``roots``: the component of each of them.
    ``place``: position of a hash in ``active``, -1 for none. ``cluster``: dense cluster of a hash, -1 for none.
    """

    values: HashValues
    tables: Sequence[str]
    artifact: Artifact
    active: Indices
    roots: Indices
    place: Indices
    cluster: Indices

    @classmethod
    def read(cls, values: HashValues, tables: Sequence[str], artifact: Artifact) -> _Found:
        components, clusters = Components(len(values)), Components(len(values))
        active, dense = shared(values), np.zeros(len(values), dtype=bool)
        for left, right, in_run in _blocks(values, tables, artifact):
            components.join(left, right)
            clusters.join(left[in_run], right[in_run])
            for side in (left, right):
                active[side] = True
                dense[side[in_run]] = True
        one, other = values.twins[:, active[values.twins].all(axis=0)]
        components.join(one, other)
        chosen = np.flatnonzero(active)
        roots = components.roots(chosen)
        order = np.argsort(roots, kind="stable")
        place = np.full(len(values), -1, dtype=np.int64)
        place[chosen[order]] = np.arange(len(order))
        cluster = np.full(len(values), -1, dtype=np.int64)
        cluster[dense] = clusters.roots(np.flatnonzero(dense))
        return cls(values, tables, artifact, chosen[order], roots[order], place, cluster)

    def pairs(self) -> Iterator[tuple[Indices, Indices]]:
        """Blocks of pairs outside dense clusters, the lower hash first."""
        for left, right, in_run in _blocks(self.values, self.tables, self.artifact):
            kept = ~in_run & ((self.cluster[left] < 0) | (self.cluster[left] != self.cluster[right]))
            yield np.minimum(left[kept], right[kept]), np.maximum(left[kept], right[kept])


def shared(values: HashValues) -> Bools:
    """True for hashes of several images that are compared with each other."""
    several: Bools = (values.counts > 1) & are_compared(values.kinds, values.kinds)
    return several


def _blocks(values: HashValues, tables: Sequence[str], artifact: Artifact) -> Iterator[tuple[Indices, Indices, Bools]]:
    """Near hashes whose images are candidates, and dense runs, of which only some are."""
    for table in tables:
        for left, right, dense in read_numbers(artifact, table, PAIR_COLUMNS.names):
            one, other = (np.searchsorted(values.hashes, side) for side in (left, right))
            wanted = dense | are_compared(values.kinds[one], values.kinds[other])
            yield one[wanted], other[wanted], dense[wanted]


@dataclass(frozen=True)
class _Task:
    """``left`` and ``right``: pairs of hashes; ``own``: hashes whose images are compared with each other; ``clusters``:
    hashes of dense clusters."""

    found: _Found
    left: Indices
    right: Indices
    own: Indices
    clusters: Indices

    @property
    def hashes(self) -> Indices:
        return np.unique(np.concatenate([self.left, self.right, self.own, self.clusters]))

    def members(self) -> tuple[Indices, Indices]:
        """For each member the hash, numbered within the task, and its position in the list of all nodes."""
        hashes = self.hashes
        starts, counts = self.found.values.starts[hashes], self.found.values.counts[hashes]
        value = np.repeat(np.arange(len(hashes)), counts)
        return value, np.arange(len(value)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)

    def nodes(self) -> Indices:
        return self.found.values.nodes[self.members()[1]]

    def write(self, number: int, rows: Indices, artifact: Artifact) -> None:
        values, hashes = self.found.values, self.hashes
        value, at = self.members()
        cluster = np.where(np.isin(hashes, self.clusters), self.found.cluster[hashes], -1)
        members = {
            "value": value,
            "hash": values.hashes[hashes][value],
            "own": np.isin(hashes, self.own)[value],
            "cluster": cluster[value],
            "node": values.nodes[at],
            "kinds": values.node_kinds[at],
            "row": rows[values.nodes[at]],
        }
        write_numbers(artifact, members_of(number), MEMBER_COLUMNS, [members])
        candidates = {"left": np.searchsorted(hashes, self.left), "right": np.searchsorted(hashes, self.right)}
        write_numbers(artifact, candidates_of(number), CANDIDATE_COLUMNS, [candidates])


def members_of(task: int) -> str:
    """Shard with a task's members."""
    return f"members-{task:06}"


def candidates_of(task: int) -> str:
    """Shard with a task's candidates."""
    return f"candidates-{task:06}"


def _tasks(found: _Found) -> Iterator[_Task]:
    """Tasks that are not empty, in order."""
    counts = np.zeros(len(found.active), dtype=np.int64)
    for left, _ in found.pairs():
        counts += np.bincount(found.place[left], minlength=len(counts))
    task_of = _numbered(found.roots, counts + found.values.counts[found.active])
    per_task = np.bincount(task_of, weights=counts).astype(np.int64)
    own = found.active[shared(found.values)[found.active]]
    dense = np.flatnonzero(found.cluster >= 0)
    of_own, of_dense = (task_of[found.place[hashes]] for hashes in (own, found.cluster[dense]))
    dense, of_dense = (part[np.argsort(of_dense, kind="stable")] for part in (dense, of_dense))
    for first, last in _batches(per_task):
        task, left, right = _pairs_of(found, task_of, first, last)
        for number in range(first, last):
            parts = [
                part[slice(*np.searchsorted(of_part, [number, number + 1]))]
                for part, of_part in ((left, task), (right, task), (own, of_own), (dense, of_dense))
            ]
            if any(len(part) for part in parts):
                yield _Task(found, *parts)


def _numbered(roots: Indices, work: Indices) -> Indices:
    """The task of each active hash: hashes of a component together, unless it is too large for one task."""
    if not len(roots):
        return NONE
    before = np.cumsum(work) - work
    first = np.flatnonzero(np.diff(roots, prepend=-1))
    sizes = np.diff(first, append=len(roots))
    whole = np.repeat(np.add.reduceat(work, first) <= WORK, sizes)
    place = np.where(whole, np.repeat(before[first], sizes), before) // WORK
    numbers: Indices = np.unique(place, return_inverse=True)[1]
    return numbers


def _batches(pairs: Indices) -> Iterator[tuple[int, int]]:
    """Ranges of tasks whose pairs fit into memory together, or of one task."""
    first = 0
    while first < len(pairs):
        fitting = int(np.searchsorted(np.cumsum(pairs[first:]), PAIRS_IN_MEMORY, side="right"))
        last = first + max(1, fitting)
        yield first, last
        first = last


def _pairs_of(found: _Found, task_of: Indices, first: int, last: int) -> tuple[Indices, Indices, Indices]:
    """Task, left and right of the pairs of some tasks, ordered by task and pair."""
    parts = [(NONE, NONE, NONE)]
    for left, right in found.pairs():
        task = task_of[found.place[left]]
        mine = (task >= first) & (task < last)
        parts.append((task[mine], left[mine], right[mine]))
    task, left, right = (np.concatenate([part[k] for part in parts]) for k in range(3))
    order = np.lexsort((right, left, task))
    return task[order], left[order], right[order]


def _write_looks(task: Indices, row: Indices, artifact: Artifact) -> None:
    """Commit the lists of needed signatures, each a range of rows, and the plan."""
    order = np.lexsort((task, row))
    task, row = task[order], row[order]
    plan = [{"task": NONE, "looks": NONE}]
    for number, start in enumerate(range(0, len(row), LOOKS)):
        part = slice(start, start + LOOKS)
        tasks, rows = task[part], row[part]
        order = np.lexsort((rows, tasks))
        block = {"task": tasks[order], "row": rows[order]}
        stats = {"first": int(rows[0]), "last": int(rows[-1])}
        write_numbers(artifact, needed_of(number), NEEDED_COLUMNS, [block], stats=stats)
        users = np.unique(tasks)
        plan.append({"task": users, "looks": np.full(len(users), number)})
    write_numbers(artifact, PLAN, PLAN_COLUMNS, plan)


def needed_of(looks: int) -> str:
    """Shard that lists the rows of a file of signatures."""
    return f"needed-{looks:06}"
