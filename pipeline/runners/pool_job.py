"""Jobs of stages without a model (ingest, dedup, select, export): shards written by worker processes, or on a cluster.

A task that keeps failing is quarantined and the others go on; a full disk ends the run; once a stop is requested,
running tasks are finished and none is started. In a shared folder each task is claimed first.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from ...errors import BadInput
from ...manifests.artifact import Artifact
from .interrupts import interrupts
from .messages import Assignment, Event, Pulse, ShardDone, ShardFailed, ShardLost, ShardTask
from .placement import TaskPlacement
from .pool import WAIT, Done, Wait, run_pool
from .ray.cluster import cluster_size
from .ray.pool import RayWorkerPool, cluster
from .scheduler import Scheduler
from .shard_queue import JobResult, ShardQueue
from .task_worker import ShardWriter, TaskJob, write_task

if TYPE_CHECKING:
    from .progress import Progress

Task = TypeVar("Task")


@contextmanager
def job_session(progress: Progress) -> Iterator[tuple[Callable[[Event], None], threading.Event]]:
    """Show a job's progress while the body runs; yields ``report`` and ``stop``, which the first signal sets."""
    stop = threading.Event()
    with progress.shown(Console(stderr=True)) as report, interrupts(stop.set):
        yield report, stop


def run_pool_job(
    tasks: Iterable[Task],
    write: ShardWriter[Task],
    artifact: Artifact,
    placement: TaskPlacement,
    report: Callable[[Event], None],
    stop: threading.Event,
    *,
    shard_name: Callable[[Task], str],
    shards: Callable[[Task], Sequence[str]] | None = None,
    careful: Callable[[Task], Task] | None = None,
    reads: Sequence[str] = (),
) -> JobResult:
    """Write every task's shards into ``artifact``. Returns when all are committed or quarantined, or ``stop`` is set.

    ``shard_name``: name under which a task is claimed and quarantined; ``shards``: those that it commits, that one by
    default. ``careful``: maps a task whose worker died to the task to try next. ``reads``: local paths of the input,
    which each machine of a cluster must see. Tasks are read only as workers are free, and must be picklable.
    """

    def units() -> Iterator[ShardTask]:
        for task in tasks:
            name = shard_name(task)
            yield ShardTask(name, tuple(shards(task)) if shards is not None else (name,), task)

    def made_careful(unit: ShardTask) -> ShardTask:
        return unit if careful is None else replace(unit, work=careful(unit.work))

    todo: Iterator[ShardTask] = units()
    first = next(todo, None)
    todo = itertools.chain([first] if first is not None else [], todo)
    if placement.ray is not None and first is not None and not stop.is_set():
        with cluster(placement.ray) as connection:
            artifact.fence()
            size = cluster_size(placement.ray, connection.machines.gpus, connection.machines.cores)
            pool = RayWorkerPool(TaskJob(write, tuple(reads)), artifact, connection, size, report)
            return Scheduler(pool, artifact, report, stop).run(todo, made_careful)
    queue = ShardQueue(artifact, report, todo, made_careful)
    return _run_here(queue, write, artifact, placement.processes, report, stop)


def refuse_taking_back(artifact: Artifact, why: str) -> None:
    """Raise BadInput where committed shards are to be taken back, which other processes may be adding to."""
    if artifact.shared:
        raise BadInput(f"{why}; run the command once without --share, which takes the shards made of it back")


def local_paths(places: Iterable[str]) -> list[str]:
    """Those of paths and URLs that are on this machine, or on a file system mounted here."""
    return [place for place in places if "://" not in place]


def _run_here(
    queue: ShardQueue[ShardTask],
    write: ShardWriter[Any],
    artifact: Artifact,
    processes: int,
    report: Callable[[Event], None],
    stop: threading.Event,
) -> JobResult:
    """Write the queue's tasks in processes of this machine."""
    function = functools.partial(write_task, write=write, artifact=artifact.attach())
    for outcome in run_pool(_assignments(queue), function, processes, stop, _careful(queue)):
        name = outcome.task.shard.name
        if not isinstance(outcome, Done):
            queue.failed(name, outcome.error, most=1)  # the pool has tried it several times
            report(ShardFailed(name, outcome.error))
        elif outcome.result is None:
            queue.lost(name)
            report(ShardLost(name))
        else:
            queue.done(name)
            for record in outcome.result:
                report(Pulse(rows=record.rows))
                report(ShardDone(record))
    queue.result.interrupted = stop.is_set()
    return queue.result


def _assignments(queue: ShardQueue[ShardTask]) -> Iterator[Assignment[ShardTask] | Wait]:
    while (assignment := queue.next()) is not None or not queue.empty:
        yield assignment if assignment is not None else WAIT


def _careful(queue: ShardQueue[ShardTask]) -> Callable[[Assignment[ShardTask]], Assignment[ShardTask]]:
    return lambda assignment: replace(assignment, shard=queue.careful(assignment.shard))
