"""The search for duplicates by hashes and signatures, as steps of tasks that any runner of pool jobs can serve.

A task is a small description; what it reads and writes are committed files of a working artifact. So a killed run goes
on with the tasks that are missing, and nothing passes through the memory of the process that hands them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ....manifests.artifact import Artifact
from ....manifests.manifest import ShardRecord
from ..arrays import NONE, Indices
from ..hash_sets import HashSet
from ..steps import Step, step
from . import partition
from .confirm_task import JOINED_COLUMNS, ConfirmTask, write_joined
from .files import all_numbers
from .hash_values import hash_values
from .looks import LooksTask, Source, write_looks
from .partition import PLAN, PLAN_COLUMNS, candidates_of, divide, needed_of
from .table_search import VALUES, estimate, table_tasks, write_table, write_values

STAGE = "near"
_CONFIRMED, _COPIED = 1000, 50_000  # pairs, and signatures, per second: a guess


class NearSearch:
    """The search among the files of a set, and between them and references."""

    def __init__(self, hashed: HashSet, references: HashSet | None, radius: int) -> None:
        self._sets = [hashed] if references is None else [hashed, references]
        self._files, self._radius = len(hashed.contents), radius
        self._values = hash_values(hashed.contents, references.contents if references is not None else None)
        self._tables = table_tasks(self._values.hashes, radius)

    @property
    def config(self) -> dict[str, Any]:
        """What intermediate results depend on beside the hashes."""
        last = self._tables[-1]
        tables = [len(last.table.edges), len(last.table.chosen), last.parts]
        return {"radius": self._radius, "tables": tables, "division": [partition.WORK, partition.LOOKS]}

    def steps(self, artifact: Artifact) -> Iterator[Step]:
        """The steps in order. The tasks of one must be committed before the next is asked for."""
        if VALUES not in artifact.committed():
            write_values(self._values.hashes, artifact)
        yield step("tables searched", self._tables, write_table, estimate(self._values.hashes, self._radius), artifact)
        if PLAN not in artifact.committed():
            divide(self._values, [task.name for task in self._tables], self._rows(), artifact)
        number, looks = all_numbers(artifact, PLAN, PLAN_COLUMNS)
        records = artifact.committed()
        needed = {name: records[needed_of(name)] for name in np.unique(looks).tolist()}
        copies = [self._copying(name, record) for name, record in needed.items()]
        signatures = sum(record.count for record in needed.values())
        yield step("signatures copied", copies, write_looks, signatures / _COPIED, artifact)
        tasks = [self._confirming(task, looks[number == task].tolist()) for task in np.unique(number).tolist()]
        pairs = sum(records[candidates_of(task.number)].count for task in tasks)
        yield step("candidates confirmed", tasks, write_joined, (signatures + pairs) / _CONFIRMED, artifact)

    def result(self, artifact: Artifact) -> tuple[Indices, Indices]:
        """Pairs of nodes: files that show the same image, enough of them to connect each group; and a file of each
        group with the lowest reference that it repeats, whose number is added to that of the files."""
        parts: list[tuple[Indices, ...]] = [(NONE, NONE)]
        for task in np.unique(all_numbers(artifact, PLAN, PLAN_COLUMNS)[0]).tolist():
            parts.append(all_numbers(artifact, joined_of(task), JOINED_COLUMNS))
        left, right = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
        return left, right

    def _rows(self) -> Indices:
        """The row of each node among those of all sets."""
        firsts = np.cumsum([0, *(len(one.rows) for one in self._sets[:-1])])
        return np.concatenate([first + one.first for first, one in zip(firsts, self._sets, strict=True)])

    def _copying(self, looks: int, needed: ShardRecord) -> LooksTask:
        first, last = int(needed.stats["first"]), int(needed.stats["last"])
        sources, start = [], 0
        for one in self._sets:
            for shard, of_set, end in zip(one.shards, one.starts[:-1].tolist(), one.starts[1:].tolist(), strict=True):
                if start + of_set <= last and start + end > first:
                    sources.append(Source(one.artifact.attach(), shard, start + of_set))
            start += len(one.rows)
        return LooksTask(looks_of(looks), needed.shard, tuple(sources))

    def _confirming(self, task: int, looks: Sequence[int]) -> ConfirmTask:
        return ConfirmTask(joined_of(task), task, tuple(map(looks_of, looks)), self._files, self._radius)


def looks_of(number: int) -> str:
    """Shard with signatures."""
    return f"looks-{number:06}"


def joined_of(task: int) -> str:
    """Shard with what a task joined."""
    return f"joined-{task:06}"
