"""Shard queue of a run: remaining shards, failures per shard, shards claimed by other processes in a shared folder.

The runners (:mod:`.scheduler`, :mod:`.inline`) take shards from it and report their results to it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...manifests.artifact import Artifact
from ...manifests.files.locks import NOTICE_SECONDS, LockHeld
from ...manifests.manifest import ShardRecord
from ...manifests.shards import InputShard
from .messages import Assignment, DoneElsewhere, Event, Note

MAX_FAILURES = 3  # failures of a shard before it is quarantined
LOOK_SECONDS = 2.0  # between checks of shards that other processes hold
_PATIENCE = 0.5  # seconds until a claim is tried again whose guard another process holds
_LISTING_SHARE = 0.05  # of the time may go into listing what others have committed in a store


@dataclass
class JobResult:
    """Result of a run. ``quarantined``: reasons by shard; ``interrupted``: Ctrl-C stopped it."""

    quarantined: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


class ShardQueue:
    """Shards to assign. In a shared folder each is claimed first; shards claimed by other processes are waited for."""

    def __init__(self, artifact: Artifact, report: Callable[[Event], None], shards: Sequence[InputShard]) -> None:
        self.result = JobResult()
        self._artifact, self._report = artifact, report
        self._queue = deque(shards)
        self._assigned: dict[str, InputShard] = {}  # assigned, no result yet
        self._elsewhere: dict[str, InputShard] = {}  # claimed by another process that shares the folder
        self._failures: Counter[str] = Counter()
        self._committed: dict[str, ShardRecord] = {}  # by other processes, if the folder is shared
        self._looked = 0.0
        self._list_after = 0.0
        self._held_since = self._try_after = 0.0
        self._waiting = ""
        if artifact.shared and artifact.claims is not None and not artifact.folder.is_local and shards:
            # Runs begin at different shards: each claim of one that is done already costs requests.
            self._queue.rotate(-(int(artifact.claims.owner.run, 16) % len(shards)))

    @property
    def empty(self) -> bool:
        """Whether nothing is left to assign, unless an assigned shard is requeued."""
        return not self._queue and not self._elsewhere

    def next(self) -> Assignment | None:
        """The next shard to do; None if none is free at the moment."""
        if time.monotonic() < self._try_after:
            return None
        self._look()
        self._read_news()
        while self._queue:
            shard = self._queue.popleft()
            if self._is_known(shard):
                continue
            token = None
            if self._artifact.claims is not None:
                try:
                    token = self._artifact.claims.take(shard.name)
                except LockHeld as held:
                    self._queue.appendleft(shard)
                    self._report_held(held)
                    return None
                self._held_since = 0.0
                if token is None:
                    self._elsewhere[shard.name] = shard
                    continue
                if self._is_over(shard):
                    self._artifact.claims.release(shard.name)
                    continue
            self._assigned[shard.name] = shard
            return Assignment(shard, token)
        self._report_waiting()
        return None

    def _look(self) -> None:
        """Every :data:`LOOK_SECONDS`, requeue shards claimed by others: done by now, or free because their run died."""
        if self._elsewhere and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            self._queue.extend(self._elsewhere.values())
            self._elsewhere.clear()

    def _read_news(self) -> None:
        """Read what others have committed; in a store from time to time, as listing it takes long."""
        if not self._artifact.shared:
            return
        local, started = self._artifact.folder.is_local, time.monotonic()
        if not local and started < self._list_after:
            return
        self._committed |= {record.shard: record for record in self._artifact.manifest.news()}
        ended = time.monotonic()
        self._list_after = ended + max(LOOK_SECONDS, (ended - started) / _LISTING_SHARE)

    def _is_over(self, shard: InputShard) -> bool:
        """Whether another process committed or quarantined a shard before we claimed it."""
        if not self._artifact.shared:
            return False
        if self._artifact.folder.is_local:
            self._read_news()
        elif (record := self._artifact.manifest.find(shard.name)) is not None:
            self._committed[shard.name] = record
        if self._is_known(shard):
            return True
        if self._artifact.is_quarantined(shard.name):
            self.result.quarantined[shard.name] = self._artifact.quarantined()[shard.name]
            return True
        return False

    def _is_known(self, shard: InputShard) -> bool:
        """Whether another process committed a queued shard; reported once, since the shard then leaves the queue."""
        record = self._committed.get(shard.name)
        if record is not None:
            self._report(DoneElsewhere(record))
        return record is not None

    def _report_held(self, held: LockHeld) -> None:
        """Wait for a process that holds the guard for long; it may be stopped."""
        now = time.monotonic()
        self._held_since, self._try_after = self._held_since or now, now + _PATIENCE
        if now - self._held_since > NOTICE_SECONDS and held.waiting != self._waiting:
            self._waiting = held.waiting
            self._report(Note(held.waiting))

    def _report_waiting(self) -> None:
        if not self._elsewhere or self._assigned or self._artifact.claims is None:
            return
        holders = {str(self._artifact.claims.holder(shard) or "a process that just ended") for shard in self._elsewhere}
        text = f"waiting for {len(self._elsewhere)} shards that others work on: {', '.join(sorted(holders))}"
        if text != self._waiting:
            self._waiting = text
            self._report(Note(text))

    def done(self, shard: str) -> None:
        """Record that an assigned shard is committed."""
        self._back(shard)

    def abandoned(self, shard: str, reason: str) -> ShardRecord | None:
        """Handle the loss of a shard's worker. Returns its record if it was committed before; else it failed."""
        claims = self._artifact.claims
        if claims is not None:
            claims.release(shard)  # a worker that is still alive cannot commit it from here on
        record = self._artifact.manifest.find(shard)
        if record is None:
            self.failed(shard, reason)
        else:
            self.done(shard)
        return record

    def lost(self, shard: str) -> None:
        """Record that another process took the shard over, taking ours for dead."""
        self._elsewhere[shard] = self._back(shard)

    def failed(self, shard: str, reason: str) -> None:
        """Requeue a shard at the end; after :data:`MAX_FAILURES` failures it is quarantined."""
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
        return self._assigned.pop(shard)
