"""The same worker inside this process: for filesystems that other processes cannot see."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence

from ..errors import RunFailed
from ..manifests.artifact import Artifact
from ..manifests.shards import InputShard
from ..models.engine import EngineDead
from .events import Event, ShardFailed
from .runner import MAX_FAILURES, Outcome
from .worker import Stage, work


class DirectChannel:
    """Hands shards to a worker in the same event loop; failed ones come back until they are quarantined."""

    def __init__(self, shards: Sequence[InputShard], artifact: Artifact, report: Callable[[Event], None]) -> None:
        self.stopping = asyncio.Event()
        self.outcome = Outcome()
        self._queue = deque(shards)
        self._by_name = {shard.name: shard for shard in shards}
        self._failures: Counter[str] = Counter()
        self._artifact, self._report = artifact, report

    @property
    def waiting(self) -> bool:
        return bool(self._queue)

    async def next_shard(self) -> InputShard | None:
        return self._queue.popleft() if self._queue else None

    def send(self, event: Event) -> None:
        if isinstance(event, ShardFailed):
            self._failures[event.shard] += 1
            if self._failures[event.shard] < MAX_FAILURES:
                self._queue.append(self._by_name[event.shard])
            else:
                self._artifact.quarantine(event.shard, event.reason)
                self.outcome.quarantined[event.shard] = event.reason
        self._report(event)


def run_inline(
    stage: Stage, artifact: Artifact, report: Callable[[Event], None], shards: Sequence[InputShard]
) -> Outcome:
    """Run ``stage`` over ``shards`` in this process. Raises RunFailed where the engine dies."""

    async def run() -> Outcome:
        channel = DirectChannel(shards, artifact, report)
        while channel.waiting:  # a shard that failed last comes back after the worker saw an empty queue
            await work(stage, artifact, channel)
        return channel.outcome

    if not shards:
        return Outcome()
    try:
        return asyncio.run(run())
    except EngineDead as error:
        raise RunFailed(f"the engine died: {error}; run the same command again") from None
