"""Job of `capipe ingest`: splits sources into tasks, one per shard, for the worker pool."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...stages.ingest.shard import STAGE, IngestConfig, IngestTask, ingest_shard, pending
from ...stages.ingest.shard import plan as cut
from ...stages.ingest.source_refs import ItemRef
from ...stages.ingest.sources import open_sources, source_places
from ..runners.messages import Event
from ..runners.placement import TaskPlacement, task_placement
from ..runners.pool_job import local_paths, run_pool_job
from ..runners.ray.cluster import RayCluster
from ..runners.shard_queue import JobResult


@dataclass(frozen=True)
class IngestPlan:
    """An ingest run before its first item is read: the locked output and the opened sources."""

    config: IngestConfig
    artifact: Artifact
    items: Iterator[ItemRef]
    placement: TaskPlacement
    reads: tuple[str, ...]  # local paths of the sources


def plan_ingest(
    sources: Sequence[str],
    out: str,
    config: IngestConfig,
    *,
    workers: int | None = None,
    fresh: bool = False,
    share: bool = False,
    cluster: RayCluster | None = None,
) -> IngestPlan:
    """Check the sources and lock the output. Raises CapipeError; then nothing was written."""
    reads = source_places(sources) + ([config.image_folder] if config.image_folder is not None else [])
    items = open_sources(sources, config.columns, config.image_key, config.reach, config.follow_links)
    semantic, run = config.model_dump(mode="json"), {"sources": list(sources)}
    artifact = Artifact.create(out, STAGE, semantic, run, fresh=fresh, share=share, reads=reads)
    try:
        if not share:
            artifact.release_quarantine()
        if any(source.startswith("hf://") for source in sources):
            from ...stages.ingest import huggingface  # imports the `datasets` package, which takes seconds

            artifact.note(commits=huggingface.commits())
    except CapipeError:
        artifact.close()
        raise
    shared = artifact.folder.is_shared and not any(source.startswith("memory:") for source in sources)
    placement = task_placement(workers, shared, cluster)
    return IngestPlan(config, artifact, items, placement, tuple(local_paths(reads)))


def execute_ingest(plan: IngestPlan, report: Callable[[Event], None], stop: threading.Event) -> JobResult:
    """Ingest uncommitted shards; returns when all are committed or quarantined, or ``stop`` is set."""
    return run_pool_job(
        _tasks(plan),
        functools.partial(ingest_shard, config=plan.config),
        plan.artifact,
        plan.placement,
        report,
        stop,
        shard_name=lambda task: task.shard,
        careful=lambda task: replace(task, careful=True),
        reads=plan.reads,
    )


def _tasks(plan: IngestPlan) -> Iterator[IngestTask]:
    """The shards to write; their total number is noted in the artifact once the sources are read to the end."""
    shards, items = set(plan.artifact.committed()), 0

    def counted() -> Iterator[ItemRef]:
        nonlocal items
        for ref in plan.items:
            items += 1
            yield ref

    for task in pending(cut(counted(), plan.config), plan.artifact):
        shards.add(task.shard)
        yield task
    plan.artifact.note(shards_total=len(shards), items=items)
