"""Placement of a job's workers: processes on this machine, or actors on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ...manifests.artifact import Artifact
from ...manifests.shards import InputShard
from .decoders import decoders_of, settled
from .inline import run_inline
from .local import ProcessWorkerPool
from .messages import Event
from .ray.cluster import RayCluster, cluster_size
from .ray.pool import RayWorkerPool, cluster
from .scheduler import Scheduler
from .shard_queue import JobResult
from .worker import Stage


@dataclass(frozen=True)
class Placement:
    """``gpus``: this machine's CUDA devices, one worker each (``0,1``: one worker with both); none: one on CPU."""

    gpus: tuple[str, ...] = ()
    ray: RayCluster | None = None

    def run(
        self, stage: Stage, artifact: Artifact, report: Callable[[Event], None], shards: list[InputShard]
    ) -> JobResult:
        """Do the shards here; returns when all are committed or quarantined, or on Ctrl-C."""
        if not (artifact.folder.is_shared and all(shard.is_shared for shard in shards)):
            return run_inline(settled(stage, decoders_of(len(os.sched_getaffinity(0)), 1)), artifact, report, shards)
        if self.ray is None or not shards:
            return Scheduler(ProcessWorkerPool(stage, artifact, self.gpus), artifact, report).run(shards)
        with cluster(self.ray) as connection:
            artifact.fence()
            size = cluster_size(self.ray, connection.machines.gpus)
            return Scheduler(RayWorkerPool(stage, artifact, connection, size, report), artifact, report).run(shards)


@dataclass(frozen=True)
class TaskPlacement:
    """Where the tasks of a job without a model run. ``processes``: of this machine, 0: in this one; ``ray``: actors
    instead, one per core of a cluster."""

    processes: int
    ray: RayCluster | None = None

    def here(self) -> TaskPlacement:
        """In this process: for files that no other one can see, or for tasks not worth starting one."""
        return TaskPlacement(0)

    def at_most(self, processes: int | None) -> TaskPlacement:
        """No more processes of this machine than these."""
        return self if processes is None else replace(self, processes=min(self.processes, processes))

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Keep the connection to the cluster, if there is one, between several jobs."""
        if self.ray is None:
            yield
            return
        with cluster(self.ray):
            yield


def task_placement(workers: int | None, shared: bool, ray: RayCluster | None = None) -> TaskPlacement:
    """``workers``: processes, one per core by default. ``shared``: whether other processes can see the files."""
    if not shared:
        return TaskPlacement(0)
    return TaskPlacement(workers if workers is not None else len(os.sched_getaffinity(0)), ray)
