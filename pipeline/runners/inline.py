"""Inline runner: the worker in this process, for filesystems that other processes cannot see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ...errors import RunFailed
from ...manifests.artifact import Artifact
from ...manifests.shards import InputShard
from ...models.engines.base import EngineDead
from .messages import Event, ShardDone, ShardFailed, ShardLost
from .scheduler import POLL_SECONDS
from .shard_queue import JobResult, ShardQueue
from .worker import Answer, Stage, work


class DirectChannel:
    """Assigns shards to a worker in the same event loop; failed shards are requeued until they are quarantined."""

    def __init__(self, shards: Sequence[InputShard], artifact: Artifact, report: Callable[[Event], None]) -> None:
        self.stopping = asyncio.Event()
        self.queue = ShardQueue(artifact, report, shards)
        self._report, self._said_wait = report, False

    async def next_shard(self) -> Answer:
        while (assignment := self.queue.next()) is None and not self.queue.empty:
            if not self._said_wait:
                self._said_wait = True
                return "wait"
            await asyncio.sleep(POLL_SECONDS)  # processes that share the folder hold the rest, and may die
        self._said_wait = False
        return assignment

    def send(self, event: Event) -> None:
        if isinstance(event, ShardFailed):
            self.queue.failed(event.shard, event.reason)
        elif isinstance(event, ShardLost):
            self.queue.lost(event.shard)
        elif isinstance(event, ShardDone):
            self.queue.done(event.record.shard)
        self._report(event)


def run_inline(
    stage: Stage, artifact: Artifact, report: Callable[[Event], None], shards: Sequence[InputShard]
) -> JobResult:
    """Run ``stage`` over ``shards`` in this process. Raises RunFailed if the engine dies."""

    async def run() -> JobResult:
        channel = DirectChannel(shards, artifact, report)
        while not channel.queue.empty:  # a shard that failed last comes back after the worker saw an empty queue
            await work(stage, artifact, channel)
        return channel.queue.result

    if not shards:
        return JobResult()
    try:
        return asyncio.run(run())
    except EngineDead as error:
        raise RunFailed(f"the engine died: {error}; run the same command again") from None
