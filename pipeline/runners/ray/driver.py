"""The process that talks to a Ray cluster for a command: starts actors, and passes orders and events on.

In a process of its own, because Ray ends the process that it is loaded into when the head of its cluster is lost, and
writes to that process's stdout. Here that ends no command, and cuts no line.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import BadInput, CapipeError
from ....manifests.artifact import Artifact
from ....models.worker_process import MessageSocket
from ..local import CLOSING_SECONDS
from ..messages import WorkerFailed
from ..scheduler import Order
from ..task_worker import Job
from .actor import DriverContext, RayWorker
from .cluster import ClusterSize, RayCluster

STORE_BYTES = 80 * 2**20  # of a cluster started here: nothing large goes through its object store


@dataclass(frozen=True)
class Machines:
    """A cluster's machines: the number of GPUs of each, and of all cores."""

    gpus: tuple[int, ...]
    cores: int


@dataclass(frozen=True)
class OpenPool:
    """The actors started from here on do this job."""

    job: Job
    artifact: Artifact
    context: DriverContext
    size: ClusterSize


@dataclass(frozen=True)
class StartActor:
    number: int


@dataclass(frozen=True)
class SendOrder:
    number: int
    order: Order


@dataclass(frozen=True)
class Dismiss:
    """Ask an actor to close its engine; its end then waits for that."""

    number: int


@dataclass(frozen=True)
class EndActor:
    """Kill an actor; answered by :class:`ActorEnded`."""

    number: int


Request = OpenPool | StartActor | SendOrder | Dismiss | EndActor


@dataclass(frozen=True)
class ActorEvents:
    """Events of an actor; the last one is None if it has ended."""

    number: int
    events: list[Any]


@dataclass(frozen=True)
class ActorLost:
    number: int
    reason: str
    failure: WorkerFailed | None = None


@dataclass(frozen=True)
class ActorEnded:
    number: int


Answer = ActorEvents | ActorLost | ActorEnded


def driver_main(connection: MessageSocket, *, config: RayCluster, folder: Path | None) -> None:
    """Main function of the process. Answers with :class:`Machines`, or the error, then with an :data:`Answer` to each
    request. ``folder``: for the files of a cluster that is to be started; None for a running one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the command handles them
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _silence()
    if folder is not None:  # before Ray is imported
        _isolate()
    import ray

    try:
        connection.send(_connected(config, folder))
    except CapipeError as error:
        connection.send(error)
        return
    asyncio.run(_Driver(connection).run())
    ray.shutdown()


def _silence() -> None:
    """Drop what Ray prints: its errors come as exceptions, and its logs are in its own folder."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        for descriptor in (1, 2):
            os.dup2(nowhere.fileno(), descriptor)


def _isolate() -> None:
    """Make a cluster started here listen on loopback only, require its token, and report no usage."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # the default 15 would yield to every other process here
    if "RAY_AUTH_MODE" not in os.environ:  # without a token any user of this machine could run code on the cluster
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _connected(config: RayCluster, folder: Path | None) -> Machines:
    import logging

    import ray

    more: dict[str, Any] = {"address": config.address}
    if folder is not None:
        cores = max(config.workers or 1, len(os.sched_getaffinity(0)))
        more = {"address": "local", "num_cpus": cores, "include_dashboard": False, "_temp_dir": str(folder / "r")}
        more["object_store_memory"] = STORE_BYTES
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **more)
        nodes = ray.nodes()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--ray-address {config.address or 'local'}: Ray does not answer ({reason})") from None
    machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    gpus = tuple(round(machine.get("GPU", 0)) for machine in machines)
    return Machines(gpus, sum(int(machine["CPU"]) for machine in machines))


class _Driver:
    """Actors by number, and the task that waits for the events of each."""

    def __init__(self, connection: MessageSocket) -> None:
        self._connection = connection
        self._actors: dict[int, Any] = {}
        self._leaving: dict[int, asyncio.Task[None]] = {}
        self._tasks = set[asyncio.Task[None]]()
        self._pool: OpenPool | None = None

    async def run(self) -> None:
        """Serve requests until the command closes its end."""
        requests: asyncio.Queue[Request | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def receive() -> None:
            request: Request | None = None
            while True:
                try:
                    request = self._connection.recv()
                except (EOFError, OSError):
                    request = None
                loop.call_soon_threadsafe(requests.put_nowait, request)
                if request is None:
                    return

        threading.Thread(target=receive, daemon=True).start()
        while (request := await requests.get()) is not None:
            self._serve(request)
        for task in self._tasks:
            task.cancel()

    def _serve(self, request: Request) -> None:
        if isinstance(request, OpenPool):
            self._pool = request
        elif isinstance(request, StartActor):
            self._actors[request.number] = self._started()
            self._run(self._listen(request.number))
        elif request.number not in self._actors:
            if isinstance(request, EndActor):
                self._send(ActorEnded(request.number))
        elif isinstance(request, SendOrder):
            self._actors[request.number].send_order.remote(request.order)
        elif isinstance(request, Dismiss):
            self._leaving[request.number] = self._run(self._leave(self._actors[request.number]))
        else:
            self._run(self._end(request.number))

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _send(self, answer: Answer) -> None:
        self._connection.send(answer)

    def _started(self) -> Any:
        import ray

        assert self._pool is not None
        pool, size = self._pool, self._pool.size
        options = {"num_cpus": 1, "num_gpus": size.gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        actor: Any = ray.remote(**options)(RayWorker).remote(pool.context, size.workers, size.gpus, size.machines)
        actor.work.remote(pool.job, pool.artifact)
        return actor

    async def _listen(self, number: int) -> None:
        """Pass on an actor's events until it has ended."""
        import ray

        actor = self._actors[number]
        try:
            events = await actor.hello.remote()
            while True:
                self._send(ActorEvents(number, events))
                if events and events[-1] is None:
                    break
                events = await actor.events.remote()
        except ray.exceptions.RayError as error:
            self._send(_lost(number, error))

    async def _leave(self, actor: Any) -> None:
        import ray

        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            await asyncio.wait_for(_result(actor.leave.remote()), CLOSING_SECONDS)

    async def _end(self, number: int) -> None:
        """Kill an actor, a dismissed one once it has left; the kernel's death signal ends its engine and decoders."""
        import ray

        actor = self._actors.pop(number)
        if number in self._leaving:
            await asyncio.wait([self._leaving.pop(number)])
        ray.kill(actor)
        self._send(ActorEnded(number))


async def _result(call: Any) -> Any:
    return await call


def _lost(number: int, error: Exception) -> ActorLost:
    """With the most telling line of Ray's long message about a lost actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if "died" in line or "node" in line.lower()), lines[0] if lines else "")
    reason = f"a worker of the cluster was lost ({line[:160] or type(error).__name__})"
    if "No module named 'capipe'" not in str(error):
        return ActorLost(number, reason)
    missing = "capipe is not installed on all machines of the cluster: install the same version there"
    return ActorLost(number, reason, WorkerFailed(missing, 2, final=True))
