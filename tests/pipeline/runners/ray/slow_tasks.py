"""A command whose tasks on a cluster take a moment each, so that a machine can be lost in the middle of one."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from capipe.manifests.artifact import Artifact
from capipe.pipeline import cli
from capipe.pipeline.jobs import near_search
from capipe.pipeline.runners import pool_job
from capipe.pipeline.runners.task_worker import ShardWriter, TaskJob
from capipe.stages.dedup.embeddings import cells
from capipe.stages.dedup.near import table_search

SECONDS = 0.7
AS_OF = 30_000  # hashes: the number of tables is chosen for so many
PAIRS = 300  # of embeddings per task


def slowly(task: Any, /, *, write: ShardWriter[Any], artifact: Artifact) -> Any:
    time.sleep(SECONDS)
    return write(task, artifact=artifact)


def slow_job(write: ShardWriter[Any], reads: Sequence[str]) -> TaskJob:
    return TaskJob(functools.partial(slowly, write=write), tuple(reads))


def main() -> None:
    """The command line of `capipe`, with every step of the searches on the cluster, in many tasks."""
    plan = table_search.plan
    table_search.plan = lambda count, *more: plan(AS_OF, *more)
    cells.WORK = PAIRS
    near_search._WORTH_PROCESSES = 0.0
    pool_job.TaskJob = slow_job  # type: ignore[misc, assignment]
    cli.main()
