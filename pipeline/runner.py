"""The local runner: one worker process per GPU, or one on CPU; shards handed out one by one, dead workers replaced.

The parent never touches a row. It knows at every moment which worker has which shard, so a worker that dies takes
nothing with it: its shards go to the next one, which finds their finished rows in the journals.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from ..errors import CapipeError, RunFailed
from ..manifests.artifact import Artifact
from ..manifests.shards import InputShard
from ..models.engine import EngineDead
from .events import Event, Pulse, ShardDone, ShardFailed, Want, WorkerFailed
from .interrupts import interrupts
from .worker import Stage, work

MAX_FAILURES = 3  # of one shard, before it is quarantined
EXIT_SECONDS = 20.0  # a finished worker's libraries have to tidy up
MAX_BARREN_DEATHS = 3  # workers in a row that died without finishing a row: the fault is not the shards'


@dataclass
class Outcome:
    """How a run ended. ``quarantined``: reasons by shard; ``interrupted``: Ctrl-C stopped it."""

    quarantined: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


class PipeChannel:
    """The worker's end: requests shards and reports through one duplex pipe; a thread reads what comes back."""

    def __init__(self, connection: Connection) -> None:
        self.stopping = asyncio.Event()
        self._connection = connection
        self._shards: asyncio.Queue[InputShard | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                if self._connection.closed:
                    return  # our own end: the work is over
                os._exit(3)  # the runner is gone, and with it the lock on the output: stop at once
            if message == "stop":
                self._loop.call_soon_threadsafe(self.stopping.set)
            self._loop.call_soon_threadsafe(self._shards.put_nowait, None if message == "stop" else message)

    async def next_shard(self) -> InputShard | None:
        self.send(Want())
        return await self._shards.get()

    def send(self, event: Event) -> None:
        with self._lock:
            self._connection.send(event)


def worker_main(connection: Connection, stage: Stage, artifact: Artifact, gpu: str | None) -> None:
    """Entry point of a worker process."""
    # A terminal sends Ctrl-C to the whole group, engine processes included. Blocked signals are inherited, so only the
    # runner hears it, and lets us finish what is in the engine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    failure = asyncio.run(_worker(connection, stage, artifact))
    if failure is not None:
        connection.send(failure)
    connection.close()
    late = threading.Timer(EXIT_SECONDS, os._exit, (int(failure is not None),))  # an exit handler that hangs
    late.daemon = True
    late.start()
    sys.exit(int(failure is not None))


async def _worker(connection: Connection, stage: Stage, artifact: Artifact) -> WorkerFailed | None:
    try:
        await work(stage, artifact, PipeChannel(connection))
    except CapipeError as error:
        return WorkerFailed(str(error), error.exit_code, final=True)
    except EngineDead as error:
        return WorkerFailed(f"the engine died: {error}", RunFailed.exit_code, final=False)
    return None


@dataclass(eq=False)
class _Worker:
    process: Any
    connection: Connection
    gpu: str | None
    shards: dict[str, InputShard] = field(default_factory=dict)  # handed out, neither done nor failed
    wants: int = 0
    barren: bool = True


class LocalRunner:
    """Runs a stage over shards. ``report`` gets every event; ``gpus``: one worker each, an empty list means CPU."""

    def __init__(
        self, stage: Stage, artifact: Artifact, report: Callable[[Event], None], gpus: Sequence[str] = ()
    ) -> None:
        self._stage, self._artifact, self._report = stage, artifact, report
        self._gpus: list[str | None] = list(gpus) or [None]
        self._queue: deque[InputShard] = deque()
        self._failures: Counter[str] = Counter()
        self._workers: list[_Worker] = []
        self._barren_deaths = 0
        self._stop_asked = self._stopping = False
        self._outcome = Outcome()
        self._context = multiprocessing.get_context("spawn")

    def run(self, shards: Sequence[InputShard]) -> Outcome:
        """Work until all shards are committed or quarantined, or Ctrl-C. Raises CapipeError when it cannot go on."""
        self._queue.extend(shards)
        if not shards:
            return self._outcome
        with interrupts(self._ask_to_stop):
            try:
                for gpu in self._gpus[: len(shards)]:
                    self._spawn(gpu)
                while self._workers:
                    if self._stop_asked and not self._stopping:
                        self._drain()
                    self._serve()
            finally:
                for worker in self._workers:
                    worker.process.kill()
                    worker.process.join()
        self._outcome.interrupted = self._stopping
        return self._outcome

    def _spawn(self, gpu: str | None) -> None:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._stage, self._artifact.attach(), gpu)
        process = self._context.Process(target=worker_main, args=arguments)
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, gpu))

    def _serve(self) -> None:
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), timeout=0.5):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                self._handle(worker, worker.connection.recv())
            except (EOFError, ConnectionResetError):
                self._buried(worker, None)
        for worker in self._workers:
            self._hand_out(worker)

    def _handle(self, worker: _Worker, event: Event) -> None:
        if isinstance(event, Want):
            worker.wants += 1
        elif isinstance(event, ShardFailed):
            self._failed(worker.shards.pop(event.shard), event.reason)
        elif isinstance(event, WorkerFailed):
            if event.final:
                raise RunFailed(event.reason) if event.exit_code == RunFailed.exit_code else _error(event)
            self._buried(worker, event.reason)
            return
        elif isinstance(event, ShardDone):
            del worker.shards[event.record.shard]
        elif isinstance(event, Pulse) and sum(event.rows.values()) > event.recalled:
            worker.barren, self._barren_deaths = False, 0
        self._report(event)

    def _hand_out(self, worker: _Worker) -> None:
        """Answer a worker's wish: a shard, or, when there are none and nobody may fail one back, the end."""
        while worker.wants and not self._stopping and self._queue:
            shard = self._queue.popleft()
            worker.shards[shard.name] = shard
            self._tell(worker, shard)
            worker.wants -= 1
        if worker.wants and not any(other.shards for other in self._workers) and (self._stopping or not self._queue):
            self._tell(worker, None)
            worker.wants = 0

    def _tell(self, worker: _Worker, message: InputShard | str | None) -> None:
        try:
            worker.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return  # it just died: its end of the pipe says so in the next round

    def _failed(self, shard: InputShard, reason: str) -> None:
        self._failures[shard.name] += 1
        if self._failures[shard.name] < MAX_FAILURES:
            self._queue.append(shard)
        else:
            self._artifact.quarantine(shard.name, reason)
            self._outcome.quarantined[shard.name] = reason

    def _buried(self, worker: _Worker, reason: str | None) -> None:
        """A worker is gone. Clean end, or death: then its shards are tried again by a new one."""
        worker.process.join(timeout=30)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        if not worker.shards and worker.process.exitcode == 0:
            return
        reason = reason or f"the worker process died (exit code {worker.process.exitcode})"
        self._barren_deaths += worker.barren
        if self._barren_deaths >= MAX_BARREN_DEATHS:
            raise RunFailed(f"{reason}; {MAX_BARREN_DEATHS} workers in a row ended before finishing a row")
        if self._stopping:
            return
        self._report(WorkerFailed(reason, 0, final=False))
        for shard in worker.shards.values():
            self._failed(shard, reason)
        if self._queue:
            self._spawn(worker.gpu)

    def _ask_to_stop(self) -> None:
        self._stop_asked = True  # the main loop acts on it: a handler may interrupt a half-sent message

    def _drain(self) -> None:
        """Have what is in the engines finished, and nothing more begun."""
        self._stopping = True
        for worker in self._workers:
            self._tell(worker, "stop")


def _error(event: WorkerFailed) -> CapipeError:
    error = CapipeError(event.reason)
    error.exit_code = event.exit_code
    return error
