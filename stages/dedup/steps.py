"""Steps of tasks whose results are committed shards of a working artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...manifests.artifact import Artifact
from ...manifests.manifest import ShardRecord


@dataclass(frozen=True)
class Step:
    """Tasks that do not depend on each other; ``todo`` are those that are not committed.

    ``write``: writes and commits a task's shard. ``seconds``: estimated time of all on one core. ``processes``: at most
    so many at once.
    """

    name: str
    todo: Sequence[Any]
    total: int
    write: Callable[..., ShardRecord]
    seconds: float
    processes: int | None = None


def step(
    name: str,
    tasks: Sequence[Any],
    write: Callable[..., ShardRecord],
    seconds: float,
    artifact: Artifact,
    processes: int | None = None,
) -> Step:
    """A step without the tasks that are committed in the working ``artifact``."""
    committed = artifact.committed()
    todo = [task for task in tasks if task.name not in committed]
    return Step(name, todo, len(tasks), write, seconds, processes)
