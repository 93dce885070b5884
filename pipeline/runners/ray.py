"""The Ray runner: the same worker as an actor with a GPU of its own, on as many machines as the cluster has.

Shards travel as references and events as small lists; images go from storage to the worker that needs them, and never
through Ray's object store. A machine that is lost takes its actors along; the scheduler hires others and hands their
shards out again. Should the machine only have been slow, its claims are another's by then, and it can commit nothing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.files.tar import printable
from ...terminal import print_err
from .local import CLOSING_SECONDS
from .messages import Event, Note, WorkerFailed
from .ray_folders import address_problem, private_folder, read_note
from .ray_worker import Home, Placed, RayWorker
from .scheduler import Order
from .worker import Stage

STORE_BYTES = 80 * 2**20  # for a cluster started here: nothing large goes through its object store
PATIENCE_SECONDS = 20.0  # without any worker on a machine, before that is said


@dataclass(frozen=True)
class Ray:
    """A cluster. ``address``: HOST:PORT of its head, None for one to be started here. ``workers`` None: one per GPU, or
    one per machine where there is none. ``gpu``: whether workers need one where the cluster has some, or ``gpus_each``
    of one machine, where that is more than 1."""

    address: str | None
    workers: int | None = None
    gpu: bool = True
    gpus_each: int = 1


@dataclass(frozen=True)
class Size:
    """How many workers a cluster is to have, and how many GPUs each."""

    workers: int
    gpus: int


def ray_place(address: str | None, workers: int | None, gpu: bool, gpus_each: int = 1) -> Ray:
    """The cluster of ``--ray-address``, or of $RAY_ADDRESS, or the one of `ray start` here, or one to be started.

    Raises BadInput where Ray is missing, or a head that was named does not answer.
    """
    if find_spec("ray") is None:
        raise BadInput("--runner ray: Ray is not installed; pip install 'capipe[ray]'")
    if workers is not None and workers < 1:
        raise BadInput(f"--ray-workers {workers}: at least 1")
    asked = address or os.environ.get("RAY_ADDRESS") or None
    if asked == "local":
        return Ray(None, workers, gpu, gpus_each)
    if asked not in (None, "auto"):
        where = "--ray-address" if address else "RAY_ADDRESS"
        problem = address_problem(asked)
        if problem is not None:
            text = f"{where} {asked}: {problem}; start one (`ray start --head`), or leave the address out"
            raise BadInput(f"{text} to have one started here")
        return Ray(asked, workers, gpu, gpus_each)
    found, ignored = _started_here()
    if found is None and asked == "auto":
        why = "no cluster runs on this machine" if ignored is None else f"its note is ignored, for {ignored}"
        raise BadInput(f"--ray-address auto: {why}; `ray start --head`, or leave it out")
    if ignored is not None:
        _say_ignored(ignored)
    return Ray(found, workers, gpu, gpus_each)


def _started_here() -> tuple[str | None, str | None]:
    """The head of the cluster that `ray start` left a note about, None where there is none or it does not answer; and
    why a note that is there is ignored."""
    address, ignored = read_note(Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray")
    if address is not None and address_problem(address) is not None:
        address = None
    return address, ignored


@cache
def _say_ignored(reason: str) -> None:
    """A command may ask for the places of two models."""
    text = f"capipe: --runner ray: the note of a running cluster is ignored: {printable(reason)}"
    print_err(f"{text}; if it is yours, name it: --ray-address HOST:PORT")


@contextmanager
def cluster(place: Ray) -> Iterator[Size]:
    """Be connected to a cluster, started here where ``place`` names none. Raises BadInput where that fails."""
    if place.address is None:  # before Ray is imported
        _keep_to_ourselves()
    import ray

    if ray.is_initialized():
        yield _size(place)
        return
    folder = private_folder() if place.address is None else None
    try:
        _connect(place, folder)
        yield _size(place)
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _keep_to_ourselves() -> None:
    """A cluster that is started here listens on loopback alone, to who has its token, and reports to nobody."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: behind all else that runs here
    if "RAY_AUTH_MODE" not in os.environ:  # else every user of this machine could have it run code
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _connect(place: Ray, folder: Path | None) -> None:
    """``folder``: where a cluster is started, None where one is named."""
    import logging

    import ray

    more: dict[str, Any] = {"address": place.address}
    if folder is not None:
        cores = max(place.workers or 1, len(os.sched_getaffinity(0)))
        more = {"address": "local", "num_cpus": cores, "include_dashboard": False, "_temp_dir": str(folder / "r")}
        more["object_store_memory"] = STORE_BYTES
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **more)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--ray-address {place.address or 'local'}: Ray does not answer ({reason})") from None


def _size(place: Ray) -> Size:
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    return size_of(place, [round(machine.get("GPU", 0)) for machine in machines])


def size_of(place: Ray, gpus: Sequence[int]) -> Size:
    """For machines with so many GPUs each. Raises BadInput where none has as many as a worker needs."""
    each = place.gpus_each
    room = sum(count // each for count in gpus) if place.gpu else 0
    if each > 1 and not room:
        raise BadInput(
            f"--tensor-parallel {each}: no machine of the cluster has so many GPUs (most: {max(gpus, default=0)})"
        )
    return Size(place.workers or room or max(1, len(gpus)), each if room else 0)


class RayWorkerHandle:
    """An actor and the call that its next events will answer."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.started, self.name = actor, False, "a machine of the cluster"
        self.death: str | None = None
        self._leaving: Any = None
        self._dismissed = 0.0
        self.coming = actor.hello.remote()

    def send(self, order: Order) -> None:
        self.actor.send_order.remote(order)

    def end(self) -> str | None:
        self.kill()
        return self.death

    def dismiss(self) -> None:
        if self.started:
            self._leaving, self._dismissed = self.actor.leave.remote(), time.monotonic()

    def kill(self) -> None:
        """Its engine and decoders follow it, by the kernel's hand."""
        import ray

        if self._leaving is not None:
            ray.wait([self._leaving], timeout=max(0.0, self._dismissed + CLOSING_SECONDS - time.monotonic()))
        ray.kill(self.actor)


class RayWorkerPool:
    """Actors on a cluster, one per place; Ray chooses their machines, as far apart as it can."""

    def __init__(self, stage: Stage, artifact: Artifact, size: Size, report: Callable[[Event], None]) -> None:
        import ray

        self._stage, self._artifact, self._report = stage, artifact.attach(), report
        self.size = size.workers
        self._class = ray.remote(num_cpus=1, num_gpus=size.gpus, max_restarts=0, scheduling_strategy="SPREAD")(
            RayWorker
        )
        self._handles: list[RayWorkerHandle] = []
        self._lonely = time.monotonic()

    def start(self, place: int) -> RayWorkerHandle:
        actor: Any = self._class.remote(Home.here())
        self._handles.append(RayWorkerHandle(actor))
        actor.work.remote(self._stage, self._artifact)
        return self._handles[-1]

    def listen(self, seconds: float) -> Iterator[tuple[RayWorkerHandle, Event | None]]:
        import ray

        if not self._handles:
            time.sleep(seconds)  # until a place is to be tried again
            return
        by_call = {handle.coming: handle for handle in self._handles}
        ready, _ = ray.wait(list(by_call), num_returns=len(by_call), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(by_call), num_returns=1, timeout=seconds)
        for call in ready:
            yield from self._said(by_call[call])
        self._say_when_alone()

    def _said(self, handle: RayWorkerHandle) -> Iterator[tuple[RayWorkerHandle, Event | None]]:
        import ray

        try:
            events = ray.get(handle.coming)
        except ray.exceptions.RayError as error:
            self._handles.remove(handle)
            handle.death = _death(error)
            if "No module named 'capipe'" in str(error):
                reason = "capipe is not installed on all machines of the cluster: install the same version there"
                yield handle, WorkerFailed(reason, 2, final=True)
            yield handle, None
            return
        handle.started = True
        if events and events[-1] is None:
            self._handles.remove(handle)
        else:
            handle.coming = handle.actor.events.remote()
        for event in events:
            if isinstance(event, Placed):
                handle.name = event.name
            else:
                yield handle, event

    def _say_when_alone(self) -> None:
        """A cluster without room makes a run wait, which a person should know."""
        if any(handle.started for handle in self._handles):
            self._lonely = time.monotonic()
        elif self._handles and time.monotonic() - self._lonely > PATIENCE_SECONDS:
            self._lonely = float("inf")
            self._report(Note("waiting for the cluster to have room for a worker (`ray status` says what is taken)"))

    def close(self) -> None:
        """Actors end with the connection, if not before."""


def _death(error: Exception) -> str:
    """One line of Ray's many about a lost actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = next((line for line in lines if "died" in line or "node" in line.lower()), lines[0] if lines else "")
    return f"a worker of the cluster was lost ({kept[:160] or type(error).__name__})"
