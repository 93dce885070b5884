"""A command whose tasks and calls of a model take a moment each, so that a machine can be lost in the middle of one."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from capipe.manifests.artifact import Artifact
from capipe.manifests.shards import Row
from capipe.pipeline import cli
from capipe.pipeline.jobs import near_search
from capipe.pipeline.runners import placement, pool_job
from capipe.pipeline.runners.ray.pool import RayWorkerPool
from capipe.pipeline.runners.task_worker import ShardWriter, TaskJob
from capipe.pipeline.runners.worker import Processor, Stage
from capipe.stages.dedup.embeddings import cells
from capipe.stages.dedup.near import table_search

SECONDS = 0.7  # of a task
CALL_SECONDS = 1.5  # of a call of a model, so that a loss is noticed before the others have done the rest
AS_OF = 30_000  # hashes: the number of tables is chosen for so many
PAIRS = 300  # of embeddings per task


def slowly(task: Any, /, *, write: ShardWriter[Any], artifact: Artifact) -> Any:
    time.sleep(SECONDS)
    return write(task, artifact=artifact)


def slow_job(write: ShardWriter[Any], reads: Sequence[str]) -> TaskJob:
    return TaskJob(functools.partial(slowly, write=write), tuple(reads))


class SlowProcessor:
    """A processor that takes a moment for each call, and few rows ahead, so that every worker has some."""

    window = 8  # a shard's

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    async def process(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        await asyncio.sleep(CALL_SECONDS)
        return await self._processor.process(rows)


@dataclass(frozen=True)
class SlowStage:
    """``setup``: the stage's, which an actor changes by its machine."""

    stage: Any
    setup: Any

    async def load(self) -> SlowProcessor:
        stage = replace(self.stage, setup=self.setup) if self.setup is not None else self.stage
        return SlowProcessor(await stage.load())


def slow_pool(stage: Stage, *more: Any) -> RayWorkerPool:
    return RayWorkerPool(SlowStage(stage, getattr(stage, "setup", None)), *more)  # type: ignore[arg-type]


def main() -> None:
    """The command line of `capipe`, with every step of the searches on the cluster, in many tasks."""
    plan = table_search.plan
    table_search.plan = lambda count, *more: plan(AS_OF, *more)
    cells.WORK = PAIRS
    near_search._WORTH_PROCESSES = 0.0
    pool_job.TaskJob = slow_job  # type: ignore[misc, assignment]
    placement.RayWorkerPool = slow_pool  # type: ignore[misc, assignment]
    cli.main()
