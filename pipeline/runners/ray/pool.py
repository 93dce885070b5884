"""Ray runner: the same worker as an actor, with its own GPU or core, on all machines of a cluster.

Shards travel as references and events as small lists; images go from storage to the worker that needs them, and never
through Ray's object store. The actors of a lost machine are lost too; the scheduler starts others and assigns their
shards again. If the machine was only slow, its claims are void by then, and it cannot commit. If the head is lost, so
is the whole pool.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ....errors import CapipeError, RunFailed
from ....manifests.artifact import Artifact
from ....models.worker_process import ONE_THREAD, WorkerProcess, readable
from ..local import CLOSING_SECONDS
from ..messages import Event, Note
from ..scheduler import Order, PoolLost
from ..task_worker import Job, TaskJob
from .actor import ActorName, DriverContext
from .cluster import ClusterSize, RayCluster
from .driver import (
    ActorEnded,
    ActorLost,
    Answer,
    Dismiss,
    EndActor,
    Machines,
    OpenPool,
    Request,
    SendOrder,
    StartActor,
    driver_main,
)
from .folders import private_folder

PATIENCE_SECONDS = 20.0  # without any started worker, before the user is notified
SHUTDOWN_SECONDS = 20.0  # for Ray to disconnect, and to end a cluster of its own
LOST = "the connection to the Ray cluster is lost: its head, or Ray on this machine, has ended"

_open: dict[str | None, ClusterConnection] = {}  # by address


class ClusterConnection:
    """A connection to a cluster, and its machines."""

    def __init__(self, process: WorkerProcess, machines: Machines) -> None:
        self.machines = machines
        self._process, self._count, self._lost = process, 0, False

    def number(self) -> int:
        """A new actor's number."""
        self._count += 1
        return self._count

    def send(self, request: Request) -> None:
        """Send a request; a lost connection is noticed by :meth:`receive`."""
        with contextlib.suppress(OSError):
            self._process.socket.send(request)

    def receive(self, seconds: float) -> Iterator[Answer]:
        """Answers that arrive within ``seconds``, at least until one does. Raises PoolLost."""
        while readable([self._process.socket], seconds):
            try:
                if self._lost:
                    raise EOFError
                answer: Answer = self._process.socket.recv()
            except (EOFError, OSError):
                self._lost = True
                raise PoolLost(f"{LOST}; start it, and run the same command: it resumes where it was") from None
            except BaseException:  # a signal, perhaps in the middle of a message
                self._lost = True
                raise
            yield answer
            seconds = 0

    def close(self) -> None:
        """Disconnect; a cluster that was started for it ends."""
        self._process.socket.close()
        if self._process.wait(SHUTDOWN_SECONDS) is None:
            self._process.kill()


@contextmanager
def cluster(config: RayCluster) -> Iterator[ClusterConnection]:
    """Connect to a cluster; start one here if ``config`` names none. Raises BadInput if that fails.

    Inside such a context for the same address, the connection is that one's.
    """
    if config.address in _open:
        yield _open[config.address]
        return
    folder = private_folder() if config.address is None else None
    try:
        connection = _connected(config, folder)
        _open[config.address] = connection
        try:
            yield connection
        finally:
            del _open[config.address]
            connection.close()
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _connected(config: RayCluster, folder: Path | None) -> ClusterConnection:
    process = WorkerProcess(functools.partial(driver_main, config=config, folder=folder), "capipe-ray")
    try:
        machines = process.socket.recv()
        if isinstance(machines, CapipeError):
            raise machines
    except (EOFError, OSError):
        raise RunFailed(f"--ray-address {config.address or 'local'}: Ray ended while it connected") from None
    except BaseException:
        process.kill()
        raise
    return ClusterConnection(process, machines)


class RayWorkerHandle:
    """An actor."""

    def __init__(self, connection: ClusterConnection) -> None:
        self.number, self.started, self.name = connection.number(), False, "a machine of the cluster"
        self.death: str | None = None
        self._connection = connection
        connection.send(StartActor(self.number))

    def send(self, order: Order) -> None:
        self._connection.send(SendOrder(self.number, order))

    def end(self) -> str | None:
        self.kill()
        return self.death

    def dismiss(self) -> None:
        if self.started:
            self._connection.send(Dismiss(self.number))

    def kill(self) -> None:
        """Have it killed; :meth:`RayWorkerPool.close` waits for that."""
        self._connection.send(EndActor(self.number))


class RayWorkerPool:
    """Actors on a cluster, one per slot, spread over its machines by Ray."""

    def __init__(
        self,
        job: Job,
        artifact: Artifact,
        connection: ClusterConnection,
        size: ClusterSize,
        report: Callable[[Event], None],
    ) -> None:
        self.size = size.workers
        self._connection, self._report = connection, report
        self._handles: dict[int, RayWorkerHandle] = {}  # not yet killed
        self._last_started = time.monotonic()
        context = DriverContext.current(ONE_THREAD if isinstance(job, TaskJob) else {})
        connection.send(OpenPool(job, artifact.attach(), context, size))

    def start(self, slot: int) -> RayWorkerHandle:
        handle = RayWorkerHandle(self._connection)
        self._handles[handle.number] = handle
        return handle

    def listen(self, seconds: float) -> Iterator[tuple[RayWorkerHandle, Event | None]]:
        for answer in self._connection.receive(seconds):
            yield from self._events(answer)
        self._report_waiting()

    def _events(self, answer: Answer) -> Iterator[tuple[RayWorkerHandle, Event | None]]:
        handle = self._handles.get(answer.number)
        if handle is None:
            return
        if isinstance(answer, ActorEnded):
            del self._handles[answer.number]
            return
        if isinstance(answer, ActorLost):
            handle.death = answer.reason
            if answer.failure is not None:
                yield handle, answer.failure
            yield handle, None
            return
        handle.started = True
        for event in answer.events:
            if isinstance(event, ActorName):
                handle.name = event.name
            else:
                yield handle, event

    def _report_waiting(self) -> None:
        """Notify the user that the run waits for room on the cluster."""
        if any(handle.started for handle in self._handles.values()):
            self._last_started = time.monotonic()
        elif self._handles and time.monotonic() - self._last_started > PATIENCE_SECONDS:
            self._last_started = float("inf")
            self._report(Note("waiting for the cluster to have room for a worker (`ray status` says what is taken)"))

    def close(self) -> None:
        """Wait until the actors that were to be killed are; at the latest they end with the connection."""
        deadline = time.monotonic() + CLOSING_SECONDS + 1
        with contextlib.suppress(PoolLost):
            while self._handles and (left := deadline - time.monotonic()) > 0:
                for answer in self._connection.receive(left):
                    if isinstance(answer, ActorEnded):
                        self._handles.pop(answer.number, None)
