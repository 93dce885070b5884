"""Where a stage's workers are to be: this machine's processes, or actors of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...manifests.artifact import Artifact
from ...manifests.shards import InputShard
from .inline import run_inline
from .local import ProcessWorkerPool
from .messages import Event
from .ray import Ray, RayWorkerPool, cluster
from .scheduler import Scheduler
from .shard_queue import JobResult
from .worker import Stage


@dataclass(frozen=True)
class Placement:
    """``gpus``: of this machine, one worker each, by their CUDA numbers (``0,1``: both); none: one worker on CPU."""

    gpus: tuple[str, ...] = ()
    ray: Ray | None = None

    def run(
        self, stage: Stage, artifact: Artifact, report: Callable[[Event], None], shards: list[InputShard]
    ) -> JobResult:
        """Do the shards here; returns when all are committed or quarantined, or on Ctrl-C."""
        if not (artifact.folder.is_shared and all(shard.is_shared for shard in shards)):
            return run_inline(stage, artifact, report, shards)
        if self.ray is None or not shards:
            return Scheduler(ProcessWorkerPool(stage, artifact, self.gpus), artifact, report).run(shards)
        with cluster(self.ray) as size:
            artifact.fence()
            return Scheduler(RayWorkerPool(stage, artifact, size, report), artifact, report).run(shards)
