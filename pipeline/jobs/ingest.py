"""`capipe ingest`, put together: sources cut into tasks, tasks over the pool, shards reported as they are committed."""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from ...errors import CapipeError, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.manifest import ShardRecord
from ...stages.ingest.shard import STAGE, IngestConfig, IngestTask, ingest_shard, pending, plan
from ...stages.ingest.source_refs import ItemRef
from ...stages.ingest.sources import open_sources, source_places
from ..runners.messages import Event, Pulse, ShardDone, ShardFailed
from ..runners.pool import Done, Failed, run_pool
from ..runners.shard_queue import JobResult
from ..runners.worker import disk_text

HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Task = TypeVar("Task", bound="Sharded")


@dataclass(frozen=True)
class IngestPlan:
    """An ingest before its first item is read: the locked output and the sources, opened."""

    config: IngestConfig
    artifact: Artifact
    items: Iterator[ItemRef]
    workers: int


def plan_ingest(
    sources: Sequence[str], out: str, config: IngestConfig, *, workers: int | None = None, fresh: bool = False
) -> IngestPlan:
    """Check the sources and lock the output. Raises CapipeError; then nothing was written."""
    reads = source_places(sources) + ([config.image_folder] if config.image_folder is not None else [])
    items = open_sources(sources, config.columns, config.image_key, config.reach, config.follow_links)
    semantic, run = config.model_dump(mode="json"), {"sources": list(sources)}
    artifact = Artifact.create(out, STAGE, semantic, run, fresh=fresh, reads=reads)
    try:
        artifact.release_quarantine()
        if any(source.startswith("hf://") for source in sources):
            from ...stages.ingest import huggingface  # imports the `datasets` package, which takes seconds

            artifact.note(commits=huggingface.commits())
    except CapipeError:
        artifact.close()
        raise
    shared = artifact.folder.is_shared and not any(source.startswith("memory:") for source in sources)
    count = workers if workers is not None else len(os.sched_getaffinity(0))
    return IngestPlan(config, artifact, items, count if shared else 0)


def execute_ingest(made: IngestPlan, report: Callable[[Event], None], stop: threading.Event) -> JobResult:
    """Ingest what is not committed yet; returns when all shards are committed or quarantined, or ``stop`` is set."""
    outcome = JobResult()
    function = functools.partial(_write_shard, config=made.config, artifact=made.artifact.attach())
    for result in run_pool(_todo(made), function, made.workers, stop, careful=_careful):
        settle(made.artifact, result, outcome, report)
    outcome.interrupted = stop.is_set()
    return outcome


def _write_shard(task: IngestTask, config: IngestConfig, artifact: Artifact) -> ShardRecord:
    """Items keep their own faults to themselves: an OSError here is the output's."""
    with writing(artifact):
        return ingest_shard(task, config, artifact)


@contextmanager
def writing(artifact: Artifact) -> Iterator[None]:
    """While a shard is written: a full disk ends the run, for neither a retry nor another shard would mend it; the rest
    (an object store's bad minute) is tried again."""
    try:
        yield
    except OSError as error:
        if error.errno in HOPELESS:
            raise RunFailed(disk_text(error, artifact.url)) from error
        raise


class Sharded(Protocol):
    """A task that writes one shard."""

    @property
    def shard(self) -> str: ...


def settle(
    artifact: Artifact,
    result: Done[Task, ShardRecord] | Failed[Task],
    outcome: JobResult,
    report: Callable[[Event], None],
) -> None:
    """Report a shard's end; one that failed for good is quarantined."""
    if isinstance(result, Done):
        report(Pulse(rows=result.result.rows))
        report(ShardDone(result.result))
        return
    shard, reason = result.task.shard, result.error
    artifact.quarantine(shard, reason)
    outcome.quarantined[shard] = reason
    report(ShardFailed(shard, reason))


def _careful(task: IngestTask) -> IngestTask:
    return replace(task, careful=True)


def _todo(made: IngestPlan) -> Iterator[IngestTask]:
    """What is to be done; once the sources are read to their end, the artifact learns of how many shards."""
    shards, items = set(made.artifact.committed()), 0

    def counted() -> Iterator[ItemRef]:
        nonlocal items
        for ref in made.items:
            items += 1
            yield ref

    for task in pending(plan(counted(), made.config), made.artifact):
        shards.add(task.shard)
        yield task
    made.artifact.note(shards_total=len(shards), items=items)
