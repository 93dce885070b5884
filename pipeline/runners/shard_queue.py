"""Shard queue of a run: remaining shards, failures per shard, shards claimed by other processes in a shared folder.

The runners (:mod:`.scheduler`, :mod:`.inline`, :mod:`.pool_job`) take shards, or tasks, from it and report their
results to it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic

from ...manifests.artifact import Artifact
from ...manifests.files.locks import NOTICE_SECONDS, LockHeld
from ...manifests.manifest import ShardRecord
from .messages import AnyUnit, Assignment, DoneElsewhere, Event, Note, ShardTask, Unit

MAX_FAILURES = 3  # failures of a shard before it is quarantined
LOOK_SECONDS = 2.0  # between checks of shards that other processes hold
_PATIENCE = 0.5  # seconds until a claim is tried again whose guard another process holds
_LISTING_SHARE = 0.05  # of the time may go into listing what others have committed in a store


@dataclass
class JobResult:
    """Result of a run. ``quarantined``: reasons by shard; ``interrupted``: Ctrl-C stopped it."""

    quarantined: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


class ShardQueue(Generic[AnyUnit]):
    """Shards to assign. In a shared folder each is claimed first; shards claimed by other processes are waited for.

    ``shards``: read as far as they are needed. ``careful``: maps a shard whose worker died to the one to try next.
    """

    def __init__(
        self,
        artifact: Artifact,
        report: Callable[[Event], None],
        shards: Iterable[AnyUnit],
        careful: Callable[[AnyUnit], AnyUnit] | None = None,
    ) -> None:
        self.result = JobResult()
        self._artifact, self._report = artifact, report
        self.careful = careful or (lambda unit: unit)
        self._queue = deque(shards if isinstance(shards, Sequence) else ())
        self._source: Iterator[AnyUnit] | None = None if isinstance(shards, Sequence) else iter(shards)
        self._assigned: dict[str, AnyUnit] = {}  # assigned, no result yet
        self._elsewhere: dict[str, AnyUnit] = {}  # claimed by another process that shares the folder
        self._failures: Counter[str] = Counter()
        self._committed: dict[str, ShardRecord] = {}  # by other processes, if the folder is shared
        self._before = artifact.committed() if self._source is not None else {}  # tasks may replace these
        self._looked = 0.0
        self._list_after = 0.0
        self._held_since = self._try_after = 0.0
        self._waiting = ""
        if artifact.shared and artifact.claims is not None and not artifact.folder.is_local and self._queue:
            # Runs begin at different shards: each claim of one that is done already costs requests.
            self._queue.rotate(-(int(artifact.claims.owner.run, 16) % len(self._queue)))

    @property
    def streams(self) -> bool:
        """Whether not all shards have been read."""
        return self._source is not None

    @property
    def empty(self) -> bool:
        """Whether nothing is left to assign, unless an assigned shard is requeued."""
        return not self._elsewhere and not self.ahead(1)

    def ahead(self, most: int) -> int:
        """Number of shards to assign, counted up to ``most``: it reads no more of them."""
        if self._source is not None and len(self._queue) < most:
            self._queue.extend(islice(self._source, most - len(self._queue)))
            if len(self._queue) < most:
                self._source = None
        return min(most, len(self._queue))

    def next(self) -> Assignment[AnyUnit] | None:
        """The next shard to do; None if none is free at the moment."""
        if time.monotonic() < self._try_after:
            return None
        self._look()
        self._read_news()
        while self.ahead(1):
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

    def _is_over(self, unit: AnyUnit) -> bool:
        """Whether another process committed or quarantined a shard before we claimed it."""
        if not self._artifact.shared:
            return False
        if self._artifact.folder.is_local:
            self._read_news()
        else:
            for shard in _shards_of(unit):
                if (record := self._artifact.manifest.find(shard)) is not None:
                    self._committed[shard] = record
        if self._is_known(unit):
            return True
        if self._artifact.is_quarantined(unit.name):
            self.result.quarantined[unit.name] = self._artifact.quarantined()[unit.name]
            return True
        return False

    def _is_known(self, unit: AnyUnit) -> bool:
        """Whether other processes committed a queued shard; reported once, since the shard then leaves the queue."""
        shards = _shards_of(unit)
        known = [self._committed[shard] for shard in shards if shard in self._committed]
        if len(known) < len(shards) or any(record == self._before.get(record.shard) for record in known):
            return False
        for record in known:
            self._report(DoneElsewhere(record))
        return True

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

    def taken_back(self, shard: str) -> list[ShardRecord] | None:
        """Take a shard from its worker, which may be lost or late: it cannot commit from here on, if there are claims.

        Returns the shard's records if it was committed before; then it is done. None: it is still to be done.
        """
        if self._artifact.claims is not None:
            self._artifact.claims.release(shard)
        unit, records = self._assigned[shard], []
        for name in _shards_of(unit):
            record = self._artifact.manifest.find(name)
            if record is None or record == self._before.get(name):
                return None
            records.append(record)
        self.done(shard)
        return records

    def abandoned(self, shard: str, reason: str) -> list[ShardRecord]:
        """Handle the loss of a shard's worker. Returns its records if it was committed before; else it failed."""
        records = self.taken_back(shard)
        if records is None:
            self._assigned[shard] = self.careful(self._assigned[shard])
            self.failed(shard, reason)
        return records or []

    def lost(self, shard: str) -> None:
        """Record that another process took the shard over, taking ours for dead."""
        self._elsewhere[shard] = self._back(shard)

    def failed(self, shard: str, reason: str, most: int = MAX_FAILURES) -> None:
        """Requeue a shard at the end; after ``most`` failures it is quarantined."""
        self._failures[shard] += 1
        if self._failures[shard] >= most:
            self._artifact.quarantine(shard, reason)
            self.result.quarantined[shard] = reason
            self._back(shard)
        else:
            self._queue.append(self._back(shard))

    def _back(self, shard: str) -> AnyUnit:
        if self._artifact.claims is not None:
            self._artifact.claims.release(shard)
        return self._assigned.pop(shard)


def _shards_of(unit: Unit) -> tuple[str, ...]:
    return unit.shards if isinstance(unit, ShardTask) else (unit.name,)
