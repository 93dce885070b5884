"""Placement of a stage's workers: processes on this machine, or actors on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from ...manifests.artifact import Artifact
from ...manifests.shards import InputShard
from .decoders import decoders_of, settled
from .inline import run_inline
from .local import ProcessWorkerPool
from .messages import Event
from .ray import RayCluster, RayWorkerPool, cluster
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
        with cluster(self.ray) as size:
            artifact.fence()
            return Scheduler(RayWorkerPool(stage, artifact, size, report), artifact, report).run(shards)
