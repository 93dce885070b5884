"""The worker as an actor of a Ray cluster. Imports no torch before its environment is set."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...models.engines.http.api_key import HOSTS_VARIABLE
from ...terminal import escape_logs

if TYPE_CHECKING:
    from ...manifests.artifact import Artifact
    from .messages import Event, WorkerFailed
    from .worker import Answer, Stage

SEE_SECONDS = 10.0  # for a folder made a moment ago on another machine to be seen here
# Sums in another order differ in their last bits; the hosts are those that the user allowed, over here.
SAME_EVERYWHERE = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", HOSTS_VARIABLE)


@dataclass(frozen=True)
class Placed:
    """Where an actor is, for a person. (Said to :mod:`.ray` alone.)"""

    name: str


@dataclass(frozen=True)
class Home:
    """What a worker takes from the process that started it: version, folder that relative paths are meant from."""

    version: str
    folder: str
    environment: Mapping[str, str]

    @classmethod
    def here(cls) -> Home:
        environment = {name: os.environ[name] for name in SAME_EVERYWHERE if name in os.environ}
        return cls(__version__, os.getcwd(), environment)  # noqa: PTH109  (a string, to be used on another machine)


class ListChannel:
    """Collects events until the runner asks for them; shards are put in by the actor."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._events: list[Event | None] = []
        self._some = asyncio.Event()
        self._asked = False  # and not answered but by "wait"

    async def next_shard(self) -> Answer:
        from .messages import Want

        if not self._asked:
            self.send(Want())
        answer = await self.answers.get()
        self._asked = answer == "wait"
        return answer

    def send(self, event: Event | None) -> None:
        self._events.append(event)
        self._some.set()

    async def taken(self) -> list[Event | None]:
        """All events since the last call, at least one."""
        await self._some.wait()
        self._some.clear()
        events, self._events = self._events, []
        return events


class RayWorker:
    """An asynchronous actor: :meth:`work` runs to the end while the runner's other calls are answered."""

    def __init__(self, home: Home) -> None:
        escape_logs()
        for name in SAME_EVERYWHERE:  # Ray sets a number of threads of its own
            os.environ.pop(name, None)
        os.environ.update(home.environment)
        self._home = home
        self._channel = ListChannel()
        self._working: asyncio.Task[WorkerFailed | None] | None = None

    async def work(self, stage: Stage, artifact: Artifact) -> None:
        """Do shards until there are no more; the last event is None."""
        from .local import work_or_failure
        from .messages import WorkerFailed

        try:
            failure = await self._problem(artifact)
            if failure is None:
                self._working = asyncio.create_task(work_or_failure(stage, artifact, self._channel))
                failure = await self._working
        except asyncio.CancelledError:  # dismissed, and the engine is closed
            failure = None
        except Exception as error:  # as of a worker process that ends by it: another may fare better
            failure = WorkerFailed(f"a worker of the cluster ended by {type(error).__name__}: {error}", 3, final=False)
        if failure is not None:
            self._channel.send(failure)
        self._channel.send(None)

    async def hello(self) -> list[Placed]:
        """Answers at once: the actor has its machine."""
        import ray

        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return [Placed(", ".join([os.uname().nodename, *(f"GPU {gpu}" for gpu in gpus)]))]

    async def leave(self) -> None:
        """Close the engine and stop; returns when that is done."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait([self._working])

    async def events(self) -> list[Event | None]:
        return await self._channel.taken()

    async def send_order(self, order: Any) -> None:
        """See :data:`.scheduler.Order`."""
        if order == "stop":
            self._channel.stopping.set()
            order = None
        self._channel.answers.put_nowait(order)

    async def _problem(self, artifact: Artifact) -> WorkerFailed | None:
        """Why this machine cannot work for that run, if so: another capipe, or another folder under the same name."""
        from .messages import WorkerFailed

        where = os.uname().nodename
        if __version__ != self._home.version:
            text = f"{where} has capipe {__version__}, and {self._home.version} was started; install that there, too"
            return WorkerFailed(text, 2, final=True)
        if os.path.isdir(self._home.folder):  # noqa: PTH112
            os.chdir(self._home.folder)
        if not await _sees(artifact):
            text = f"{artifact.url}: {where} does not see what was begun there; give --out a folder that all machines"
            return WorkerFailed(f"{text} of the cluster share, or an object store", 2, final=True)
        return None


async def _sees(artifact: Artifact) -> bool:
    """Whether this machine's view of an artifact is the one that the run began."""
    from ...errors import CapipeError
    from ...manifests.artifact import Artifact

    for _ in range(round(SEE_SECONDS)):
        try:
            return Artifact.open(artifact.url).fingerprint == artifact.fingerprint
        except (CapipeError, OSError):
            await asyncio.sleep(1)
    return False
