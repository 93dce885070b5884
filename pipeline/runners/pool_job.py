"""Jobs of stages without a model (ingest, dedup, select, export): shards written by a pool of worker processes.

A task that keeps failing is quarantined and the others go on; a full disk ends the run; once a stop is requested,
running tasks are finished and none is started.
"""

from __future__ import annotations

import errno
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from rich.console import Console

from ...errors import RunFailed
from ...manifests.artifact import Artifact
from ...manifests.files.store_errors import StoreUnavailable
from ...manifests.manifest import ShardRecord
from .interrupts import interrupts
from .messages import Event, Pulse, ShardDone, ShardFailed
from .pool import Done, run_pool
from .shard_queue import JobResult
from .worker import disk_text

if TYPE_CHECKING:
    from .progress import Progress

FATAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # neither a retry nor another shard would succeed

Task = TypeVar("Task")
TaskIn = TypeVar("TaskIn", contravariant=True)


class ShardWriter(Protocol[TaskIn]):
    """Writes and commits a task's shards. Must be picklable: a module's function, or a partial of one.

    An OSError concerns the output: errors of a source's items are recorded in their rows.
    """

    def __call__(self, task: TaskIn, /, *, artifact: Artifact) -> ShardRecord | Sequence[ShardRecord]: ...


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
    workers: int,
    report: Callable[[Event], None],
    stop: threading.Event,
    *,
    shard_name: Callable[[Task], str],
    careful: Callable[[Task], Task] | None = None,
) -> JobResult:
    """Write every task's shards into ``artifact``. Returns when all are committed or quarantined, or ``stop`` is set.

    ``shard_name``: name under which a task is quarantined. ``workers`` and ``careful``: see :func:`.pool.run_pool`.
    """
    result = JobResult()
    function = functools.partial(_write, write=write, artifact=artifact.attach())
    for outcome in run_pool(tasks, function, workers, stop, careful):
        if isinstance(outcome, Done):
            for record in outcome.result:
                report(Pulse(rows=record.rows))
                report(ShardDone(record))
            continue
        shard = shard_name(outcome.task)
        artifact.quarantine(shard, outcome.error)
        result.quarantined[shard] = outcome.error
        report(ShardFailed(shard, outcome.error))
    result.interrupted = stop.is_set()
    return result


def _write(task: Task, *, write: ShardWriter[Task], artifact: Artifact) -> Sequence[ShardRecord]:
    """Write a task's shards in a worker process. An error of the output ends the run, since others would meet it, too;
    so does a store that does not answer. Another error concerns this task's input, and is worth a retry."""
    try:
        written = write(task, artifact=artifact)
    except OSError as error:
        folder = artifact.folder.fs.url(artifact.folder.path)
        of_the_output = str(error.filename or "").startswith(f"{folder}/")
        if of_the_output or error.errno in FATAL_ERRNOS or isinstance(error, StoreUnavailable):
            raise RunFailed(disk_text(error, artifact.url)) from error
        raise
    return [written] if isinstance(written, ShardRecord) else written
