"""Local runner: one worker process per GPU, or one on CPU, each with its own socket."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...errors import CapipeError, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.files.redaction import redact_output
from ...models.child_processes import Identity, descendants, end
from ...models.engines.base import EngineDead
from ...models.worker_process import MessageSocket, WorkerProcess, readable
from .messages import Event, Want, WorkerFailed
from .scheduler import Order
from .worker import Answer, Channel, Stage, work_with

WORKER_NAME = "capipe-worker"  # in the process list
EXIT_SECONDS = 20.0  # for the exit handlers of a finished worker's libraries
CLOSING_SECONDS = 10.0  # for a dismissed worker to close its engine


class SocketChannel:
    """The worker's end of its socket: requests shards and sends events; a thread reads the runner's orders.

    ``leave``: called in the event loop on the order "leave".
    """

    def __init__(self, connection: MessageSocket, leave: Callable[[], object]) -> None:
        self.stopping = asyncio.Event()
        self._connection, self._leave = connection, leave
        self._answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._asked = False  # without an answer other than "wait"
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                if self._connection.closed:
                    return  # closed on our side: the work is done
                # The runner is gone, and with it the lock on the output: end the engine and exit at once. Usually the
                # kernel's death signal came first.
                end(descendants(os.getpid()), grace=0)
                os._exit(3)
            with contextlib.suppress(RuntimeError):  # the loop is closed: the work just ended
                self._handle(message)

    def _handle(self, message: Any) -> None:
        if message == "leave":
            self._loop.call_soon_threadsafe(self._leave)
            return
        if message == "stop":
            self._loop.call_soon_threadsafe(self.stopping.set)
        self._loop.call_soon_threadsafe(self._answers.put_nowait, None if message == "stop" else message)

    async def next_shard(self) -> Answer:
        if not self._asked:
            self.send(Want())
        answer = await self._answers.get()
        self._asked = answer == "wait"
        return answer

    def send(self, event: Event) -> None:
        with self._lock:
            self._connection.send(event)


def worker_main(connection: MessageSocket, *, stage: Stage, artifact: Artifact, gpu: str | None) -> None:
    """Main function of a worker process."""
    redact_output()
    # All three signals are blocked so far. A terminal sends SIGINT and SIGHUP to the whole process group, engine
    # processes included; blocked signals are inherited, so only the runner gets them, and it lets us finish the rows in
    # the engine. A batch system sends SIGTERM to all processes of a job; an engine ends its own processes with SIGTERM,
    # so it is not blocked, only ignored here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGINT, signal.SIGHUP})
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu or ""  # None: its model is a server's, or there is no GPU
    failure = asyncio.run(_worker(connection, stage, artifact))
    if failure is not None:
        connection.send(failure)
    connection.close()
    late = threading.Timer(EXIT_SECONDS, os._exit, (int(failure is not None),))  # an exit handler that hangs
    late.daemon = True
    late.start()
    sys.exit(int(failure is not None))


async def _worker(connection: MessageSocket, stage: Stage, artifact: Artifact) -> WorkerFailed | None:
    task = asyncio.current_task()
    assert task is not None
    try:
        return await work_or_failure(stage, artifact, SocketChannel(connection, task.cancel))
    except asyncio.CancelledError:  # by "leave"; the engine is closed
        return None


async def work_or_failure(stage: Stage, artifact: Artifact, channel: Channel) -> WorkerFailed | None:
    """Run the worker to its end. Returns the failure that ended it early, if any: the worker's last event."""
    started = time.monotonic()
    try:
        processor = await stage.load()
    except CapipeError as error:
        return WorkerFailed(str(error), error.exit_code, final=error.exit_code != RunFailed.exit_code)
    except Exception as error:  # no GPU memory, a broken library: a later try, or another slot, may succeed
        text = next(iter(str(error).splitlines()), "")
        return WorkerFailed(f"{type(error).__name__}: {text}", RunFailed.exit_code, final=False)
    try:
        await work_with(processor, artifact, channel, time.monotonic() - started)
    except CapipeError as error:
        return WorkerFailed(str(error), error.exit_code, final=True)
    except EngineDead as error:
        return WorkerFailed(f"the engine died: {error}", RunFailed.exit_code, final=False)
    return None


class ProcessWorkerHandle:
    """Handle of a worker process."""

    started = True

    def __init__(self, process: WorkerProcess, name: str) -> None:
        self.connection, self._process, self.name = process.socket, process, name
        self._dismissed: float | None = None

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, order: Order) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # listen() sees the end of the socket
            self.connection.send(order)

    def end(self) -> str | None:
        code = self._process.wait(timeout=30)
        if code is None:
            self.kill()
            code = self._process.wait()
        self.connection.close()
        return None if code == 0 else f"the worker process died (exit code {code})"

    def dismiss(self) -> None:
        self.send("leave")
        self._dismissed = time.monotonic()

    def kill(self) -> None:
        processes = self._descendants()
        if self._dismissed is not None:
            self._process.wait(timeout=max(0.0, self._dismissed + CLOSING_SECONDS - time.monotonic()))
            processes |= self._descendants()
        self._process.kill()
        end(processes)

    def _descendants(self) -> set[Identity]:
        """Live descendants; none if the process is dead, since its pid may be reused."""
        return descendants(self._process.pid) if self._process.alive else set()


class ProcessWorkerPool:
    """Worker processes on this machine. ``gpus``: one worker each; empty: one on CPU."""

    def __init__(self, stage: Stage, artifact: Artifact, gpus: Sequence[str] = ()) -> None:
        self._stage, self._artifact = stage, artifact
        self._gpus: list[str | None] = list(gpus) or [None]
        self.size = len(self._gpus)
        self._handles: list[ProcessWorkerHandle] = []

    def start(self, slot: int) -> ProcessWorkerHandle:
        gpu, artifact = self._gpus[slot], self._artifact.attach()
        main = functools.partial(worker_main, stage=self._stage, artifact=artifact, gpu=gpu)
        process = WorkerProcess(main, WORKER_NAME)
        self._handles.append(ProcessWorkerHandle(process, "this machine" if gpu is None else f"GPU {gpu}"))
        return self._handles[-1]

    def listen(self, seconds: float) -> Iterator[tuple[ProcessWorkerHandle, Event | None]]:
        self._handles = [handle for handle in self._handles if not handle.connection.closed]
        for handle in readable(self._handles, seconds):
            try:
                event = handle.connection.recv()
            except (EOFError, ConnectionResetError):
                event = None
            yield handle, event

    def close(self) -> None:
        """Nothing to release besides the workers."""
