"""The scheduler: hands shards to workers one by one, replaces workers that die, and drains on Ctrl-C.

It never touches a row, and does not know where its workers live: a :class:`WorkerPool` of local processes
(:mod:`.local`) or of actors on a cluster (:mod:`.ray`). It knows at every moment which worker has which shard, so one
that dies takes nothing with it: its shards go to the next one, which finds their finished rows in the journals. A place
where workers fail before they finish a row is tried again and then given up; the others go on (:mod:`.places`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ...errors import CapipeError, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.shards import InputShard
from .interrupts import interrupts
from .messages import Assignment, Event, Note, Pulse, Ready, ShardDone, ShardFailed, ShardLost, Want, WorkerFailed
from .places import Places
from .shard_queue import JobResult, ShardQueue

POLL_SECONDS = 0.5  # how late a stop request may be noticed

# A shard, there is none just now, a request to drain, a request to close the engine and leave, or: there are no more.
Order = Assignment | Literal["wait", "stop", "leave"] | None


class WorkerHandle(Protocol):
    """A worker as its scheduler sees it. ``started``: it lives; one on a cluster may still wait for a machine.

    ``name``: of its place, for a person.
    """

    started: bool
    name: str

    def send(self, order: Order) -> None:
        """Send it an order; nothing where it just died, which is seen elsewhere."""

    def end(self) -> str | None:
        """Wait until it is gone, which is about to happen; None for a clean end, else how it died."""

    def dismiss(self) -> None:
        """Ask it to close its engine and leave: what a :meth:`kill` that follows gives it some seconds for."""

    def kill(self) -> None:
        """End it with all that it started, and wait until they are gone."""


class WorkerPool(Protocol):
    """Where workers come from. ``size``: how many there are to be at most."""

    size: int

    def start(self, place: int) -> WorkerHandle:
        """Start a worker in one of the ``size`` places, of those before it there or none."""

    def listen(self, seconds: float) -> Iterable[tuple[WorkerHandle, Event | None]]:
        """What workers say within so many seconds; None: this one will never say anything again."""

    def close(self) -> None: ...


@dataclass(eq=False)
class _Member:
    handle: WorkerHandle
    place: int
    shards: set[str] = field(default_factory=set)  # handed out, neither done nor failed
    wants: int = 0
    waits: bool = False  # it was told that there is no shard just now
    ready: bool = False  # its model is loaded
    made_progress: bool = False  # a row is finished


class Scheduler:
    """Runs shards through a crew of workers. ``report`` gets every event."""

    def __init__(self, pool: WorkerPool, artifact: Artifact, report: Callable[[Event], None]) -> None:
        self._pool, self._artifact, self._report = pool, artifact, report
        self._members: list[_Member] = []
        self._places = Places(pool.size)
        self._stop_asked = self._stopping = False

    def run(self, shards: Sequence[InputShard]) -> JobResult:
        """Work until all shards are committed or quarantined, or Ctrl-C. Raises CapipeError when it cannot go on."""
        self._queue = ShardQueue(self._artifact, self._report, shards)
        if not shards:
            return self._queue.result
        with interrupts(self._ask_to_stop):
            try:
                for _ in range(min(self._pool.size, len(shards))):
                    self._start_elsewhere()
                while self._members or self._places.due:
                    self._round()
            except CapipeError:
                for member in self._members:  # all at once: each then has the same seconds for it
                    member.handle.dismiss()
                raise
            finally:
                for member in self._members:
                    member.handle.kill()
                self._pool.close()
        self._queue.result.interrupted = self._stopping
        return self._queue.result

    def _start(self, place: int) -> None:
        self._members.append(_Member(self._pool.start(place), place))

    def _start_elsewhere(self) -> None:
        if (place := self._places.fresh()) is not None:
            self._start(place)

    def _round(self) -> None:
        if self._stop_asked and not self._stopping:
            self._drain()
        if self._is_over:
            self._places.due.clear()
        elif not self._queue.empty:
            for place in self._places.ready(time.monotonic()):
                self._start(place)
        for handle, event in self._pool.listen(POLL_SECONDS):
            member = next((member for member in self._members if member.handle is handle), None)
            if member is None:
                continue  # what it said before its end, which is known
            if event is None:
                self._on_exit(member, None)
            else:
                self._handle(member, event)
        for member in self._members:
            self._assign(member)
        self._release_unstarted()

    def _handle(self, member: _Member, event: Event) -> None:
        if isinstance(event, Want):
            member.wants += 1
        elif isinstance(event, ShardFailed):
            member.shards.remove(event.shard)
            self._queue.failed(event.shard, event.reason)
        elif isinstance(event, ShardLost):
            member.shards.remove(event.shard)
            self._queue.lost(event.shard)
        elif isinstance(event, WorkerFailed):
            if event.final:
                raise RunFailed(event.reason) if event.exit_code == RunFailed.exit_code else _error(event)
            self._on_exit(member, event.reason)
            return
        elif isinstance(event, ShardDone):
            member.shards.remove(event.record.shard)
            self._queue.done(event.record.shard)
        elif isinstance(event, Ready):
            member.ready = True
        elif isinstance(event, Pulse) and sum(event.rows.values()) > event.recalled:
            member.made_progress = True
            self._places.worked(member.place)
        self._report(event)

    def _assign(self, member: _Member) -> None:
        """Answer a worker's wish: a shard, or, when there are none and nobody may fail one back, the end."""
        while member.wants and not self._stopping and (assignment := self._queue.next()) is not None:
            member.shards.add(assignment.shard.name)
            member.handle.send(assignment)
            member.wants, member.waits = member.wants - 1, False
        if member.wants and self._is_over:
            member.handle.send(None)
            member.wants = 0
        elif member.wants and not self._stopping and not member.waits:
            member.handle.send("wait")
            member.waits = True

    @property
    def _is_over(self) -> bool:
        """Nothing is in work, and nothing is left to hand out, or it must not be any more."""
        return not any(member.shards for member in self._members) and (self._stopping or self._queue.empty)

    def _release_unstarted(self) -> None:
        """When all is done, those that still wait for a machine of the cluster are not needed."""
        if self._is_over:
            for member in [member for member in self._members if not member.handle.started]:
                member.handle.kill()
                self._members.remove(member)

    def _on_exit(self, member: _Member, reason: str | None) -> None:
        """A worker is gone. Clean end, or death: then its shards are tried again by a new one."""
        death = member.handle.end()
        self._members.remove(member)
        if self._stopping or (not member.shards and death is None and reason is None):
            return
        reason = reason or death or "the worker ended before its shards were done"
        if not member.made_progress:
            self._place_failed(member, reason)
        else:
            self._report(WorkerFailed(reason, 0, final=False))
        for shard in member.shards:
            if (record := self._queue.abandoned(shard, reason)) is not None:
                self._report(ShardDone(record))
        if member.made_progress and not self._queue.empty:
            self._start(member.place)

    def _place_failed(self, member: _Member, reason: str) -> None:
        """Have a place tried again, or give it up. Raises RunFailed where none is left and something is to do."""
        pause = self._places.failed(member.place, time.monotonic())
        name, what = member.handle.name, "ended before it finished a row" if member.ready else "could not start"
        if pause is not None:
            self._report(Note(f"a worker on {name} {what}: {reason}; another one is tried there in {pause:g} s"))
            return
        tries = f"{self._places.failures[member.place]} workers in a row"
        if member.shards or not self._queue.empty:
            self._start_elsewhere()
            if not self._members and not self._places.due:
                last = "the last place that was left" if self._pool.size > 1 else "and there is no other place"
                raise RunFailed(f"{reason}; {tries} on {name} ended before they finished a row, {last}")
        self._report(Note(f"{name} is given up, as {tries} ended there before they finished a row: {reason}"))

    def _ask_to_stop(self) -> None:
        self._stop_asked = True  # the main loop acts on it: a handler may interrupt a half-sent message

    def _drain(self) -> None:
        """Have what is in the engines finished, and nothing more begun."""
        self._stopping = True
        for member in self._members:
            member.handle.send("stop")


def _error(event: WorkerFailed) -> CapipeError:
    error = CapipeError(event.reason)
    error.exit_code = event.exit_code
    return error
