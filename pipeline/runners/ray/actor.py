"""Worker as an actor of a Ray cluster. Does not import torch before its environment is set."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .... import __version__
from ....models.engines.http.api_key import HOSTS_VARIABLE
from ....terminal import escape_logs
from ..decoders import decoders_of, settled

if TYPE_CHECKING:
    from ....manifests.artifact import Artifact
    from ..messages import Event, WorkerFailed
    from ..task_worker import Job
    from ..worker import Answer

VISIBLE_SECONDS = 10.0  # wait for a folder that another machine just created to appear here
# Copied from the driver. Thread counts change the order of sums, and so their last bits; hosts are the user's choice.
SAME_EVERYWHERE = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", HOSTS_VARIABLE)


@dataclass(frozen=True)
class ActorName:
    """An actor's machine and GPUs, for messages. Read by :mod:`.pool` alone."""

    name: str


@dataclass(frozen=True)
class DriverContext:
    """State of the driver process that an actor copies: version, working folder (for relative paths), environment."""

    version: str
    folder: str
    environment: Mapping[str, str]

    @classmethod
    def current(cls, more: Mapping[str, str] | None = None) -> DriverContext:
        """``more``: variables that decide over those of this process."""
        environment = {name: os.environ[name] for name in SAME_EVERYWHERE if name in os.environ}
        return cls(__version__, os.getcwd(), {**environment, **(more or {})})  # noqa: PTH109  (a string, to be used on another machine)


class ListChannel:
    """Channel that buffers events until the runner fetches them; the actor puts the runner's answers in."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._events: list[Event | None] = []
        self._any = asyncio.Event()
        self._asked = False  # without an answer other than "wait"

    async def next_shard(self) -> Answer:
        from ..messages import Want

        if not self._asked:
            self.send(Want())
        answer = await self.answers.get()
        self._asked = answer == "wait"
        return answer

    def send(self, event: Event | None) -> None:
        self._events.append(event)
        self._any.set()

    async def fetch(self) -> list[Event | None]:
        """All events since the last call, at least one."""
        await self._any.wait()
        self._any.clear()
        events, self._events = self._events, []
        return events


class RayWorker:
    """An asynchronous actor: answers the runner's calls while :meth:`work` runs.

    ``workers``, ``gpus``, ``machines``: as of :class:`.cluster.ClusterSize`.
    """

    def __init__(self, driver: DriverContext, workers: int = 1, gpus: int = 0, machines: int = 1) -> None:
        escape_logs()
        for name in SAME_EVERYWHERE:  # Ray sets its own number of threads
            os.environ.pop(name, None)
        os.environ.update(driver.environment)
        self._driver = driver
        self._cluster = workers, gpus, machines
        self._channel = ListChannel()
        self._working: asyncio.Task[WorkerFailed | None] | None = None

    async def work(self, job: Job, artifact: Artifact) -> None:
        """Do shards or tasks until there are no more; the last event is None."""
        from ..local import work_or_failure
        from ..messages import WorkerFailed
        from ..task_worker import TaskJob

        try:
            failure = await self._problem(artifact, job.reads if isinstance(job, TaskJob) else ())
            if failure is None:
                if isinstance(job, TaskJob):
                    work = job.work(artifact, self._channel)
                else:
                    work = work_or_failure(settled(job, self._decoders()), artifact, self._channel)
                self._working = asyncio.create_task(work)
                failure = await self._working
        except asyncio.CancelledError:  # by leave(); the engine is closed
            failure = None
        except Exception as error:  # like a worker process that dies: another may succeed
            failure = WorkerFailed(f"a worker of the cluster ended by {type(error).__name__}: {error}", 3, final=False)
        if failure is not None:
            self._channel.send(failure)
        self._channel.send(None)

    def _decoders(self) -> int:
        """Decoding processes beside this actor's engine: its machine's processors divided among the actors there."""
        import ray

        own = ray.get_runtime_context().get_node_id()
        machine: dict[str, float] = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == own), {})
        return decoders_of(int(machine.get("CPU", 1)), actors_on(int(machine.get("GPU", 0)), *self._cluster))

    async def hello(self) -> list[ActorName]:
        """Name of the actor's machine and GPUs; returns as soon as the actor has a machine."""
        import ray

        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return [ActorName(", ".join([os.uname().nodename, *(f"GPU {gpu}" for gpu in gpus)]))]

    async def leave(self) -> None:
        """Close the engine and stop; returns when both have finished."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait([self._working])

    async def events(self) -> list[Event | None]:
        return await self._channel.fetch()

    async def send_order(self, order: Any) -> None:
        """See :data:`..scheduler.Order`."""
        if order == "stop":
            self._channel.stopping.set()
            order = None
        self._channel.answers.put_nowait(order)

    async def _problem(self, artifact: Artifact, reads: Sequence[str] = ()) -> WorkerFailed | None:
        """Reason that this machine cannot work for the run, if any: another version of capipe, an unshared folder.

        ``reads``: local paths that must exist here.
        """
        from ..messages import WorkerFailed

        where = os.uname().nodename
        if __version__ != self._driver.version:
            text = f"{where} has capipe {__version__}, and {self._driver.version} was started; install that there, too"
            return WorkerFailed(text, 2, final=True)
        if os.path.isdir(self._driver.folder):  # noqa: PTH112
            os.chdir(self._driver.folder)
        if not await _is_visible(artifact):
            text = f"{artifact.url}: {where} does not see what was begun there; give --out a folder that all machines"
            return WorkerFailed(f"{text} of the cluster share, or an object store", 2, final=True)
        unseen = next((path for path in reads if not os.path.exists(path)), None)  # noqa: PTH110
        if unseen is not None:
            text = f"{unseen}: {where} does not see it; have it in a folder that all machines of the cluster share"
            return WorkerFailed(f"{text}, or in an object store", 2, final=True)
        return None


def actors_on(machine_gpus: int, workers: int, gpus: int, machines: int) -> int:
    """The most actors on a machine with so many GPUs; Ray spreads those without GPUs evenly."""
    return min(workers, machine_gpus // gpus) if gpus else math.ceil(workers / machines)


async def _is_visible(artifact: Artifact) -> bool:
    """Whether this machine can read the artifact of the run."""
    from ....errors import CapipeError
    from ....manifests.artifact import Artifact

    for _ in range(round(VISIBLE_SECONDS)):
        try:
            return Artifact.open(artifact.url).fingerprint == artifact.fingerprint
        except (CapipeError, OSError):
            await asyncio.sleep(1)
    return False
