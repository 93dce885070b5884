"""Scheduler: assigns shards to workers one by one, replaces workers that die, drains on Ctrl-C.

It never touches a row, and works with any :class:`WorkerPool`: local processes (:mod:`.local`) or actors on a cluster
(:mod:`.ray.pool`). It tracks the shards assigned to each worker, so a death loses nothing: the shards go to the next
worker, which reads their finished rows from the journals. A slot whose workers exit before they finish a row is
retried, then abandoned; the other slots go on (:mod:`.worker_slots`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ...errors import CapipeError, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.manifest import ShardRecord
from .interrupts import interrupts
from .messages import (
    AnyUnit,
    Assignment,
    Event,
    Note,
    Pulse,
    Ready,
    ShardDone,
    ShardFailed,
    ShardLost,
    TaskDone,
    Want,
    WorkerFailed,
)
from .shard_queue import MAX_FAILURES, JobResult, ShardQueue
from .worker_slots import WorkerSlots

POLL_SECONDS = 0.5  # longest delay before a stop request is noticed
AHEAD = 64  # shards read ahead to know how many workers have something to do

# A shard; "wait": none available now; "stop": drain; "leave": close the engine and exit; None: no more shards.
Order = Assignment[Any] | Literal["wait", "stop", "leave"] | None


class PoolLost(RunFailed):
    """All workers are out of reach, for good; the message says why."""


class WorkerHandle(Protocol):
    """The scheduler's handle of a worker.

    ``started``: whether it runs; an actor may still wait for a machine. ``name``: its GPU or machine, for messages.
    """

    started: bool
    name: str

    def send(self, order: Order) -> None:
        """Send an order; ignored if the worker just died, which :meth:`WorkerPool.listen` reports."""

    def end(self) -> str | None:
        """Wait for its imminent exit; None for a clean exit, else the cause of death."""

    def dismiss(self) -> None:
        """Ask it to close its engine and exit; a later :meth:`kill` allows some seconds for that."""

    def kill(self) -> None:
        """Kill it and all its descendants, and wait until they are gone."""


class WorkerPool(Protocol):
    """Starts workers and receives their events. ``size``: number of slots, one worker each. Raises PoolLost."""

    size: int

    def start(self, slot: int) -> WorkerHandle:
        """Start a worker in a free slot."""

    def listen(self, seconds: float) -> Iterable[tuple[WorkerHandle, Event | None]]:
        """Events that arrive within ``seconds``; None: the worker's connection is closed."""

    def close(self) -> None: ...


@dataclass(eq=False)
class _Member:
    handle: WorkerHandle
    slot: int
    shards: set[str] = field(default_factory=set)  # assigned, not yet done or failed
    wants: int = 0
    waits: bool = False  # "wait" was sent
    ready: bool = False  # its model is loaded
    made_progress: bool = False  # a row is finished


class Scheduler:
    """Runs shards through a pool of workers. ``report`` gets every event. ``stop``: set to have it drain; by the first
    signal, if it is not given."""

    def __init__(
        self,
        pool: WorkerPool,
        artifact: Artifact,
        report: Callable[[Event], None],
        stop: threading.Event | None = None,
    ) -> None:
        self._pool, self._artifact, self._report = pool, artifact, report
        self._members: list[_Member] = []
        self._slots = WorkerSlots(pool.size)
        self._signals = interrupts if stop is None else nullcontext
        self._stop = stop or threading.Event()
        self._stopping = False

    def run(self, shards: Iterable[AnyUnit], careful: Callable[[AnyUnit], AnyUnit] | None = None) -> JobResult:
        """Work until all shards are committed or quarantined, or Ctrl-C. Raises CapipeError when it cannot go on.

        ``careful``: see :class:`.shard_queue.ShardQueue`.
        """
        self._queue: ShardQueue[Any] = ShardQueue(self._artifact, self._report, shards, careful)
        with self._signals(self._stop.set):
            try:
                self._start_workers(AHEAD if self._queue.streams else self._pool.size)
                while self._members or self._slots.retry_at:
                    self._round()
            except PoolLost as lost:
                self._conclude(lost)
            except CapipeError:
                for member in self._members:  # all at once, so that each has the same time for it
                    member.handle.dismiss()
                raise
            finally:
                for member in self._members:
                    member.handle.kill()
                self._pool.close()
        self._queue.result.interrupted = self._stopping
        return self._queue.result

    def _start_workers(self, most: int) -> None:
        """Start workers in unused slots for the shards that the others leave, of the next ``most``."""
        idle = sum(not member.shards for member in self._members)
        for _ in range(self._queue.ahead(most) - idle):
            self._start_in_unused_slot()

    def _start(self, slot: int) -> None:
        self._members.append(_Member(self._pool.start(slot), slot))

    def _start_in_unused_slot(self) -> None:
        if (slot := self._slots.take_unused()) is not None:
            self._start(slot)

    def _round(self) -> None:
        if self._stop.is_set() and not self._stopping:  # a signal handler may interrupt a half-sent message
            self._drain()
        if self._is_over:
            self._slots.retry_at.clear()
        elif not self._queue.empty:
            for slot in self._slots.take_due(time.monotonic()):
                self._start(slot)
        for handle, event in self._pool.listen(POLL_SECONDS):
            member = next((member for member in self._members if member.handle is handle), None)
            if member is None:
                continue  # its exit was already handled
            if event is None:
                self._on_exit(member, None)
            else:
                self._handle(member, event)
        for member in self._members:
            self._assign(member)
        if not self._stopping and self._queue.streams:
            self._start_workers(AHEAD)
        self._release_unstarted()

    def _handle(self, member: _Member, event: Event) -> None:
        if isinstance(event, Want):
            member.wants += 1
        elif isinstance(event, ShardFailed):
            member.shards.remove(event.shard)
            self._queue.failed(event.shard, event.reason, 1 if event.final else MAX_FAILURES)
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
        elif isinstance(event, TaskDone):
            member.shards.remove(event.task)
            self._queue.done(event.task)
            self._report_done(event.records)
            return
        elif isinstance(event, Ready):
            member.ready, member.made_progress = True, event.seconds is None
        elif isinstance(event, Pulse) and sum(event.rows.values()) > event.recalled:
            member.made_progress = True
            self._slots.succeeded(member.slot)
        self._report(event)

    def _assign(self, member: _Member) -> None:
        """Answer a worker's requests: a shard, "wait", or None once no shard can come back."""
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
        """Whether no shard is assigned and none is left to assign, or the run is stopping."""
        return not any(member.shards for member in self._members) and (self._stopping or self._queue.empty)

    def _release_unstarted(self) -> None:
        """Once all shards are done, kill workers that still wait for a machine of the cluster."""
        if self._is_over:
            for member in [member for member in self._members if not member.handle.started]:
                member.handle.kill()
                self._members.remove(member)

    def _on_exit(self, member: _Member, reason: str | None) -> None:
        """Handle a worker's exit: after a crash another worker retries its shards."""
        death = member.handle.end()
        self._members.remove(member)
        if self._stopping or (not member.shards and death is None and reason is None):
            return
        reason = reason or death or "the worker ended before its shards were done"
        if not member.made_progress:
            self._slot_failed(member, reason)
        else:
            self._report(WorkerFailed(reason, 0, final=False))
        for shard in member.shards:
            self._report_done(self._queue.abandoned(shard, reason))
        if member.made_progress and not self._queue.empty:
            self._start(member.slot)

    def _slot_failed(self, member: _Member, reason: str) -> None:
        """Schedule a slot's retry, or abandon it. Raises RunFailed if no slot is left but shards are."""
        pause = self._slots.failed(member.slot, time.monotonic())
        name, what = member.handle.name, "ended before it finished a row" if member.ready else "could not start"
        if pause is not None:
            self._report(Note(f"a worker on {name} {what}: {reason}; another one is tried there in {pause:g} s"))
            return
        tries = f"{self._slots.failures[member.slot]} workers in a row"
        if member.shards or not self._queue.empty:
            self._start_in_unused_slot()
            if not self._members and not self._slots.retry_at:
                last = "the last place that was left" if self._pool.size > 1 else "and there is no other place"
                raise RunFailed(f"{reason}; {tries} on {name} ended before they finished a row, {last}")
        self._report(Note(f"{name} is given up, as {tries} ended there before they finished a row: {reason}"))

    def _report_done(self, records: Iterable[ShardRecord]) -> None:
        for record in records:
            self._report(ShardDone(record))

    def _conclude(self, lost: PoolLost) -> None:
        """After the loss of the pool: its workers commit nothing more. Raises it unless all was committed before."""
        left = 0
        for shard in [shard for member in self._members for shard in member.shards]:
            records = self._queue.taken_back(shard)
            left += records is None
            self._report_done(records or ())
        self._members.clear()
        if not self._stopping and (left or not self._queue.empty):
            raise lost

    def _drain(self) -> None:
        """Let the rows in the engines finish, and start nothing more."""
        self._stopping = True
        for member in self._members:
            member.handle.send("stop")


def _error(event: WorkerFailed) -> CapipeError:
    error = CapipeError(event.reason)
    error.exit_code = event.exit_code
    return error
