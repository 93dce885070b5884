"""The desk of a run: which shards are still to do, which failed how often, and, in a shared folder, who has the others.

Whoever runs workers (:mod:`.scheduler`, :mod:`.inline`) takes shards here and says what became of them.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...manifests.artifact import Artifact
from ...manifests.manifest import ShardRecord, Tail
from ...manifests.shards import InputShard
from .messages import Assignment, DoneElsewhere, Event, Note

MAX_FAILURES = 3  # of one shard, before it is quarantined
LOOK_SECONDS = 2.0  # between looks at shards that others have


@dataclass
class JobResult:
    """How a run ended. ``quarantined``: reasons by shard; ``interrupted``: Ctrl-C stopped it."""

    quarantined: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


class ShardQueue:
    """Shards to hand out. Where the artifact has claims, each is claimed first, and those of others are waited for."""

    def __init__(self, artifact: Artifact, report: Callable[[Event], None], shards: Sequence[InputShard]) -> None:
        self.result = JobResult()
        self._artifact, self._report = artifact, report
        self._queue = deque(shards)
        self._out: dict[str, InputShard] = {}  # handed out, and not back
        self._elsewhere: dict[str, InputShard] = {}  # with another process that shares the folder
        self._failures: Counter[str] = Counter()
        self._tail = Tail(artifact.folder) if artifact.shared else None
        self._committed: dict[str, ShardRecord] = {}  # by others
        self._looked = 0.0
        self._waiting = ""

    @property
    def empty(self) -> bool:
        """Nothing is to be handed out any more, unless what is out comes back."""
        return not self._queue and not self._elsewhere

    def next(self) -> Assignment | None:
        """A shard to do, or None where there is none just now."""
        self._look()
        while self._queue:
            shard = self._queue.popleft()
            token = None
            if self._artifact.claims is not None:
                token = self._artifact.claims.take(shard.name)
                if token is None:
                    self._elsewhere[shard.name] = shard
                    continue
                if self._is_over(shard):
                    self._artifact.claims.release(shard.name)
                    continue
            self._out[shard.name] = shard
            return Assignment(shard, token)
        self._report_waiting()
        return None

    def _look(self) -> None:
        """Now and then, have shards that others had tried again: done by now, or free because their run died."""
        if self._elsewhere and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            self._queue.extend(self._elsewhere.values())
            self._elsewhere.clear()
            self._read_tail()
            self._queue = deque(shard for shard in self._queue if not self._is_known(shard))

    def _is_over(self, shard: InputShard) -> bool:
        """Whether another process did a shard, or gave it up, before we could claim it."""
        if self._tail is None:
            return False
        self._read_tail()
        if self._is_known(shard):
            return True
        if self._artifact.is_quarantined(shard.name):
            self.result.quarantined[shard.name] = self._artifact.quarantined()[shard.name]
            return True
        return False

    def _read_tail(self) -> None:
        if self._tail is not None:
            self._committed |= {record.shard: record for record in self._tail.news()}

    def _is_known(self, shard: InputShard) -> bool:
        """Whether a shard of the queue was committed by another process; said once, since it leaves the queue then."""
        record = self._committed.get(shard.name)
        if record is not None:
            self._report(DoneElsewhere(record))
        return record is not None

    def _report_waiting(self) -> None:
        if not self._elsewhere or self._out or self._artifact.claims is None:
            return
        holders = {str(self._artifact.claims.holder(shard) or "a process that just ended") for shard in self._elsewhere}
        text = f"waiting for {len(self._elsewhere)} shards that others work on: {', '.join(sorted(holders))}"
        if text != self._waiting:
            self._waiting = text
            self._report(Note(text))

    def done(self, shard: str) -> None:
        """A shard that was handed out is committed."""
        self._back(shard)

    def abandoned(self, shard: str, reason: str) -> ShardRecord | None:
        """The worker that had it is gone; its record, where it could still commit, else it counts as failed."""
        claims = self._artifact.claims
        if claims is not None:
            claims.release(shard)  # from here on nothing of it can be committed, should that worker not be dead
        record = self._artifact.committed().get(shard)
        if record is None:
            self.failed(shard, reason)
        else:
            self.done(shard)
        return record

    def lost(self, shard: str) -> None:
        """Another process has it by now: our own was thought dead."""
        self._elsewhere[shard] = self._back(shard)

    def failed(self, shard: str, reason: str) -> None:
        """To be tried again at the end of the queue; the third time it is quarantined."""
        self._failures[shard] += 1
        if self._failures[shard] >= MAX_FAILURES:
            self._artifact.quarantine(shard, reason)
            self.result.quarantined[shard] = reason
            self._back(shard)
        else:
            self._queue.append(self._back(shard))

    def _back(self, shard: str) -> InputShard:
        if self._artifact.claims is not None:
            self._artifact.claims.release(shard)
        return self._out.pop(shard)
