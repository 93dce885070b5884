"""Worker: processes the rows of many shards with one engine, without a pause between shards.

A feeder reads shards in order and keeps at most ``window`` rows in flight; each row is a task that decodes, calls the
engine and journals the result; a finished shard is committed while the rows of the next ones are in the engine.
Runners (local processes, a cluster) differ only in the :class:`Channel` that they pass to :func:`work`.

A shard with rows of a streak of engine errors is committed when the streak ends: if the streak grows long enough to end
the run (:mod:`.circuit_breaker`), none of its rows are recorded, and the same command repeats them once the cause is
fixed.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import pyarrow as pa

from ...errors import CapipeError, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.files.locks import LockHeld, Patience
from ...manifests.files.store_errors import StoreUnavailable
from ...manifests.shards import Row
from ...manifests.sharing.claims import ClaimLost
from ...manifests.status import Status
from ...models.engines.base import EngineDead
from .circuit_breaker import ErrorStreak, counting_answers
from .messages import Assignment, Event, Note, Pulse, Ready, ShardDone, ShardFailed, ShardLost
from .row_window import Window
from .shard_run import ShardRun

READ_AHEAD = 16  # rows read from a tar at a time, for stages that take single rows
OPEN_SHARDS = 4  # fed and not yet committed: bounds the finished rows in memory (more if shards are small)
HELD_ROWS = 50_000  # of finished shards that wait for a streak's end; beyond that they are committed
PULSE_SECONDS = 0.5
UNREAD = frozenset(  # set before any model runs
    {Status.CORRUPT, Status.MISSING, Status.READ_ERROR, Status.UNSUPPORTED, Status.TOO_SMALL, Status.TOO_LARGE}
)

Answer = Assignment[Any] | Literal["wait"] | None  # a shard; none at the moment; no more shards


class Processor(Protocol):
    """A loaded stage: turns readable rows into output rows.

    ``window``: rows to keep in flight so that the engine never waits; may change at any time. ``chunk``: rows processed
    together, counted from a shard's start, so that batches do not depend on where a run was stopped; 1 if rows are
    independent. ``process`` raises EngineDead or RunFailed to end the worker; any other exception becomes the
    rows' ``engine_error``. It calls :func:`.circuit_breaker.answered` for every answer of a model. ``members``: a row's
    tar members, where ``writes_tar``.
    """

    schema: pa.Schema
    chunk: int
    writes_tar: bool

    @property
    def window(self) -> int: ...

    async def process(self, rows: Sequence[Row]) -> list[dict[str, Any]]: ...

    def passed_on(self, row: Row) -> dict[str, Any]: ...

    def members(self, source: Row, row: dict[str, Any]) -> dict[str, bytes] | None: ...

    def gauges(self) -> dict[str, int]: ...

    async def aclose(self) -> None: ...


class RowByRow:
    """Base class of processors with independent rows; subclasses implement ``process_row``."""

    chunk = 1

    async def process(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [await self.process_row(row) for row in rows]

    async def process_row(self, row: Row) -> dict[str, Any]:
        raise NotImplementedError


class Stage(Protocol):
    """Picklable description of a stage; its model is loaded in the worker."""

    async def load(self) -> Processor: ...


class Channel(Protocol):
    """A worker's connection to its runner. ``next_shard`` is called again after "wait", never after None."""

    stopping: asyncio.Event

    async def next_shard(self) -> Answer: ...

    def send(self, event: Event) -> None: ...


class Worker:
    """Worker loop, described in the module's docstring. ``run`` returns after the last shard, or on a stop."""

    def __init__(self, processor: Processor, artifact: Artifact, channel: Channel) -> None:
        self.processor, self.artifact, self.channel = processor, artifact, channel
        self.window = Window(lambda: processor.window)
        self.concluded = asyncio.Event()
        self.commit_lock = asyncio.Lock()
        self.tasks: set[asyncio.Task[None]] = set()
        self.conclusions: set[asyncio.Task[None]] = set()  # those of the tasks that commit a shard
        self.runs: set[ShardRun] = set()
        self.failed = asyncio.Event()
        self.failure: BaseException | None = None
        self.counts: Counter[str] = Counter()
        self.recalled = self.committing = 0
        self.streak = ErrorStreak[ShardRun]()
        self.starved = False  # no shard is available at the moment

    async def run(self) -> None:
        """Process shards to the end; raises the error that ended the worker, after all its tasks are done.

        Finished shards are committed before that: a commit runs in a thread, which a cancelled task would leave behind.
        """
        pulse = asyncio.create_task(self._pulse())
        feeder = asyncio.create_task(self._feed())
        failed = asyncio.create_task(self.failed.wait())
        try:
            await asyncio.wait({feeder, failed}, return_when=asyncio.FIRST_COMPLETED)
            if feeder.done():
                feeder.result()
                await self._until_settled(failed)
                if not self.failed.is_set() and not self.channel.stopping.is_set():
                    self._settle_all(self.streak.over())  # the streak ends with the input
                    await self._until_settled(failed)
        finally:
            for task in (feeder, failed, pulse, *(self.tasks - self.conclusions)):
                task.cancel()
            await asyncio.gather(feeder, failed, pulse, *self.tasks, return_exceptions=True)
            for run in self.runs:
                run.journal.close()
        self._send_pulse()
        if self.failure is not None:
            raise self.failure

    async def _until_settled(self, failed: asyncio.Task[Any]) -> None:
        while self.tasks and not self.failed.is_set():
            await asyncio.wait({*self.tasks, failed}, return_when=asyncio.FIRST_COMPLETED)

    async def _feed(self) -> None:
        while not self.channel.stopping.is_set():
            await self._await_room()
            while (assignment := await self.channel.next_shard()) == "wait":
                self.starved = True
                self._end_streak_if_idle()
            self.starved = False
            if assignment is None:
                return
            try:
                run = ShardRun(self.artifact, assignment)
            except OSError as error:  # the journal cannot be written: nor could any other shard's
                self._fail(error)
                return
            self.runs.add(run)
            await self._feed_rows(run)
            self._settle(run)

    async def _await_room(self) -> None:
        """Wait until few enough shards are open; more may be open if they hold too few rows to fill the engine."""
        while True:
            waiting = {run for run in self.streak.shards if run.over}
            if sum(run.held for run in waiting) > HELD_ROWS:
                self._settle_all(self.streak.over())
            runs = self.runs - waiting
            if len(runs) < OPEN_SHARDS or sum(run.held for run in runs) < 2 * self.processor.window:
                return
            self.concluded.clear()
            await self.concluded.wait()

    async def _feed_rows(self, run: ShardRun) -> None:
        """Start a task for every chunk without results; a stop leaves the shard unfinished."""
        rows, count = iter(run.reader), 0
        chunk = self.processor.chunk
        ahead = chunk if chunk > 1 else READ_AHEAD
        try:
            while batch := await asyncio.to_thread(_take, rows, ahead):
                for start in range(0, len(batch), chunk):
                    if not await self._feed_chunk(run, batch[start : start + chunk]):
                        return
                count += len(batch)
            run.total = count
        except StoreUnavailable as error:  # nor could any other shard be read
            self._fail(error)
        except (OSError, CapipeError, pa.ArrowException) as error:
            run.failure = str(error) if isinstance(error, CapipeError) else f"{run.shard.url}: {error}"
            run.total = count

    async def _feed_chunk(self, run: ShardRun, rows: Sequence[Row]) -> bool:
        """Recall the rows' results, or start a task for them once the window has room. False: a stop was requested."""
        readable = [row for row in rows if row.status is Status.OK]
        for row in rows:
            if row.status is not Status.OK:
                run.rows[row.index] = self.processor.passed_on(row)
                self.counts[row.status] += 1
        if not readable:
            return True
        if run.recall(readable):
            self.recalled += len(readable)
            self.counts.update(run.rows[row.index]["status"] for row in readable)
            return True
        for taken in range(len(readable)):
            await self.window.acquire()
            if self.channel.stopping.is_set():
                for _ in range(taken + 1):
                    self.window.release()
                return False
        run.pending += len(readable)
        self._start(self._process(run, readable))
        return True

    def _start(self, coroutine: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _process(self, run: ShardRun, rows: Sequence[Row]) -> None:
        answers = counting_answers()
        try:
            try:
                results = await self.processor.process(rows)
            except (EngineDead, RunFailed):
                raise
            except Exception as error:  # recorded in the rows; the others go on
                failed = {"status": str(Status.ENGINE_ERROR), "error": f"{type(error).__name__}: {error}"}
                results = [{**self.processor.passed_on(row), **failed} for row in rows]
            for row, result in zip(rows, results, strict=True):
                self._note_streak(run, row, result, answers.count > 0)
                run.finish(row.index, result)
                self.counts[result["status"]] += 1
        except (EngineDead, OSError, RunFailed) as error:
            self._fail(error)
        finally:
            run.pending -= len(rows)
            for _ in rows:
                self.window.release()
        self._settle(run)
        self._end_streak_if_idle()

    def _note_streak(self, run: ShardRun, row: Row, result: dict[str, Any], answered: bool) -> None:
        """Extend or end the streak of errors with a row's result; a row without a model's answer does neither.

        Raises RunFailed if the streak is too long.
        """
        status, error = result["status"], result["error"]
        if status != Status.ENGINE_ERROR:
            if answered and status not in UNREAD:
                self._settle_all(self.streak.over())
        elif all((side.get("status"), side.get("error")) != (status, error) for side in row.beside.values()):
            self._settle_all(self.streak.failed(run, error or "", (row.key, row.uid or "")))  # not a passed-on error

    def _end_streak_if_idle(self) -> None:
        """Commit if nothing is in progress and no shard is available: other processes may wait for these shards."""
        if self.starved and all(run.over for run in self.runs):
            self._settle_all(self.streak.over())

    def _settle_all(self, runs: Iterable[ShardRun]) -> None:
        for run in runs:
            self._settle(run)
        self.concluded.set()  # there may be room for another shard now

    def _settle(self, run: ShardRun) -> None:
        if self.failure is not None or not run.over:
            return
        if run.failure is None and run in self.streak.shards:
            self.concluded.set()  # commits later, but leaves room for others
        else:
            run.pending = -1  # settled: only one task may conclude it
            self.conclusions.add(task := self._start(self._conclude(run)))
            task.add_done_callback(self.conclusions.discard)

    async def _conclude(self, run: ShardRun) -> None:
        """Commit a finished shard, or report an unreadable one; its journal is kept for the retry."""
        self.committing += 1
        try:
            if run.failure is None:
                async with self.commit_lock:
                    record = await asyncio.to_thread(run.commit, self.processor, self._patience())
                self._send_pulse()
                self.channel.send(ShardDone(record))
            else:
                self.channel.send(ShardFailed(run.shard.name, run.failure))
        except ClaimLost:
            self.channel.send(ShardLost(run.shard.name))
        except LockHeld:  # a stop was requested while another process held the guard: the journal has the rows
            pass
        except (OSError, RunFailed) as error:
            self._fail(error)
        except Exception as error:  # fails this shard alone
            reason = str(error) if isinstance(error, CapipeError) else f"{type(error).__name__}: {error}"
            self.channel.send(ShardFailed(run.shard.name, reason))
        finally:
            run.journal.close()
            self.runs.discard(run)
            self.committing -= 1
            self.concluded.set()
            self._end_streak_if_idle()

    def _patience(self) -> Patience:
        """With another process that commits: until a stop is requested; a long wait is reported. For a thread."""
        loop = asyncio.get_running_loop()

        def say(line: str) -> None:
            loop.call_soon_threadsafe(self.channel.send, Note(line))

        return Patience(stopped=self.channel.stopping.is_set, say=say)

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            if isinstance(error, OSError):
                self.failure = RunFailed(disk_text(error, self.artifact.url))
            self.failed.set()

    async def _pulse(self) -> None:
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            self._send_pulse()

    def _send_pulse(self) -> None:
        counts, self.counts = self.counts, Counter()
        recalled, self.recalled = self.recalled, 0
        gauges = self.processor.gauges()
        self.channel.send(Pulse(dict(counts), recalled, committing=self.committing, **gauges))


def _take(rows: Iterator[Row], count: int) -> list[Row]:
    return list(itertools.islice(rows, count))


def disk_text(error: OSError, where: str | None = None) -> str:
    """One-line message about a disk or store that cannot be written (or read), with the fix. ``where``: its folder, for
    errors that do not name an object of a store."""
    named = str(error.filename or "")
    where = named if "://" in named else where or named or "the disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}: no space left; free some and run the same command: it resumes where it was"
    return f"{where}: {error.strerror or error}; fix that and run the same command: it resumes where it was"


async def work(stage: Stage, artifact: Artifact, channel: Channel) -> None:
    """Load the stage's processor and process shards until the channel has no more, or a stop."""
    started = time.monotonic()
    processor = await stage.load()
    await work_with(processor, artifact, channel, time.monotonic() - started)


async def work_with(processor: Processor, artifact: Artifact, channel: Channel, seconds: float) -> None:
    """Like :func:`work`, with a loaded processor, which is closed at the end. ``seconds``: its load time."""
    try:
        channel.send(Ready(seconds))
        await Worker(processor, artifact, channel).run()
    finally:
        await processor.aclose()
