"""Ray runner: the same worker as an actor with its own GPU, on all machines of a cluster.

Shards travel as references and events as small lists; images go from storage to the worker that needs them, and never
through Ray's object store. The actors of a lost machine are lost too; the scheduler starts others and assigns their
shards again. If the machine was only slow, its claims are void by then, and it cannot commit.
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
from .ray_worker import ActorName, DriverContext, RayWorker
from .scheduler import Order
from .worker import Stage

STORE_BYTES = 80 * 2**20  # of a cluster started here: nothing large goes through its object store
PATIENCE_SECONDS = 20.0  # without any started worker, before the user is notified


@dataclass(frozen=True)
class RayCluster:
    """Cluster settings. ``address``: HOST:PORT of the head; None: start one here. ``workers``: None: one per GPU, or
    one per machine without GPUs. ``gpu``: whether a worker takes ``gpus_each`` GPUs of a machine if the cluster has
    any."""

    address: str | None
    workers: int | None = None
    gpu: bool = True
    gpus_each: int = 1


@dataclass(frozen=True)
class ClusterSize:
    """Number of a run's workers on a cluster, GPUs per worker, and machines."""

    workers: int
    gpus: int
    machines: int = 1


def ray_cluster(address: str | None, workers: int | None, gpu: bool, gpus_each: int = 1) -> RayCluster:
    """The cluster named by ``--ray-address`` or $RAY_ADDRESS, else the one of `ray start` here, else one to be started.

    Raises BadInput if Ray is missing, or a named head does not answer.
    """
    if find_spec("ray") is None:
        raise BadInput("--runner ray: Ray is not installed; pip install 'capipe[ray]'")
    if workers is not None and workers < 1:
        raise BadInput(f"--ray-workers {workers}: at least 1")
    requested = address or os.environ.get("RAY_ADDRESS") or None
    if requested == "local":
        return RayCluster(None, workers, gpu, gpus_each)
    if requested not in (None, "auto"):
        where = "--ray-address" if address else "RAY_ADDRESS"
        problem = address_problem(requested)
        if problem is not None:
            text = f"{where} {requested}: {problem}; start one (`ray start --head`), or leave the address out"
            raise BadInput(f"{text} to have one started here")
        return RayCluster(requested, workers, gpu, gpus_each)
    running, ignored = _started_here()
    if running is None and requested == "auto":
        why = "no cluster runs on this machine" if ignored is None else f"its note is ignored, for {ignored}"
        raise BadInput(f"--ray-address auto: {why}; `ray start --head`, or leave it out")
    if ignored is not None:
        _warn_ignored(ignored)
    return RayCluster(running, workers, gpu, gpus_each)


def _started_here() -> tuple[str | None, str | None]:
    """Address in the note of `ray start` (None without a note, or if the head does not answer), and the reason for
    ignoring the note, if any."""
    address, ignored = read_note(Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray")
    if address is not None and address_problem(address) is not None:
        address = None
    return address, ignored


@cache
def _warn_ignored(reason: str) -> None:
    """Warn once per process: a command may place two models."""
    text = f"capipe: --runner ray: the note of a running cluster is ignored: {printable(reason)}"
    print_err(f"{text}; if it is yours, name it: --ray-address HOST:PORT")


@contextmanager
def cluster(config: RayCluster) -> Iterator[ClusterSize]:
    """Connect to a cluster; start one here if ``config`` names none. Raises BadInput if that fails."""
    if config.address is None:  # before Ray is imported
        _isolate()
    import ray

    if ray.is_initialized():
        yield _size(config)
        return
    folder = private_folder() if config.address is None else None
    try:
        _connect(config, folder)
        yield _size(config)
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _isolate() -> None:
    """Make a cluster started here listen on loopback only, require its token, and report no usage."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # the default 15 would yield to every other process here
    if "RAY_AUTH_MODE" not in os.environ:  # without a token any user of this machine could run code on the cluster
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _connect(config: RayCluster, folder: Path | None) -> None:
    """``folder``: temporary folder of a cluster to start; None for a running one."""
    import logging

    import ray

    more: dict[str, Any] = {"address": config.address}
    if folder is not None:
        cores = max(config.workers or 1, len(os.sched_getaffinity(0)))
        more = {"address": "local", "num_cpus": cores, "include_dashboard": False, "_temp_dir": str(folder / "r")}
        more["object_store_memory"] = STORE_BYTES
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **more)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--ray-address {config.address or 'local'}: Ray does not answer ({reason})") from None


def _size(config: RayCluster) -> ClusterSize:
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    return cluster_size(config, [round(machine.get("GPU", 0)) for machine in machines])


def cluster_size(config: RayCluster, gpus: Sequence[int]) -> ClusterSize:
    """Size from the machines' GPU counts. Raises BadInput if no machine has enough GPUs for a worker."""
    per_worker = config.gpus_each
    room = sum(count // per_worker for count in gpus) if config.gpu else 0
    if per_worker > 1 and not room:
        raise BadInput(
            f"--tensor-parallel {per_worker}: no machine of the cluster has so many GPUs (most: {max(gpus, default=0)})"
        )
    machines = max(1, len(gpus))
    return ClusterSize(config.workers or room or machines, per_worker if room else 0, machines)


class RayWorkerHandle:
    """An actor, and the pending call for its next events."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.started, self.name = actor, False, "a machine of the cluster"
        self.death: str | None = None
        self._leaving: Any = None
        self._dismissed = 0.0
        self.pending_call = actor.hello.remote()

    def send(self, order: Order) -> None:
        self.actor.send_order.remote(order)

    def end(self) -> str | None:
        self.kill()
        return self.death

    def dismiss(self) -> None:
        if self.started:
            self._leaving, self._dismissed = self.actor.leave.remote(), time.monotonic()

    def kill(self) -> None:
        """Kill the actor; the kernel's death signal then ends its engine and decoders."""
        import ray

        if self._leaving is not None:
            ray.wait([self._leaving], timeout=max(0.0, self._dismissed + CLOSING_SECONDS - time.monotonic()))
        ray.kill(self.actor)


class RayWorkerPool:
    """Actors on a cluster, one per slot, spread over its machines by Ray."""

    def __init__(self, stage: Stage, artifact: Artifact, size: ClusterSize, report: Callable[[Event], None]) -> None:
        import ray

        self._stage, self._artifact, self._report = stage, artifact.attach(), report
        self.size, self._size = size.workers, size
        self._class = ray.remote(num_cpus=1, num_gpus=size.gpus, max_restarts=0, scheduling_strategy="SPREAD")(
            RayWorker
        )
        self._handles: list[RayWorkerHandle] = []
        self._last_started = time.monotonic()

    def start(self, slot: int) -> RayWorkerHandle:
        actor: Any = self._class.remote(
            DriverContext.current(), self._size.workers, self._size.gpus, self._size.machines
        )
        self._handles.append(RayWorkerHandle(actor))
        actor.work.remote(self._stage, self._artifact)
        return self._handles[-1]

    def listen(self, seconds: float) -> Iterator[tuple[RayWorkerHandle, Event | None]]:
        import ray

        if not self._handles:
            time.sleep(seconds)  # until a slot is retried
            return
        by_call = {handle.pending_call: handle for handle in self._handles}
        ready, _ = ray.wait(list(by_call), num_returns=len(by_call), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(by_call), num_returns=1, timeout=seconds)
        for call in ready:
            yield from self._events(by_call[call])
        self._report_waiting()

    def _events(self, handle: RayWorkerHandle) -> Iterator[tuple[RayWorkerHandle, Event | None]]:
        import ray

        try:
            events = ray.get(handle.pending_call)
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
            handle.pending_call = handle.actor.events.remote()
        for event in events:
            if isinstance(event, ActorName):
                handle.name = event.name
            else:
                yield handle, event

    def _report_waiting(self) -> None:
        """Notify the user that the run waits for room on the cluster."""
        if any(handle.started for handle in self._handles):
            self._last_started = time.monotonic()
        elif self._handles and time.monotonic() - self._last_started > PATIENCE_SECONDS:
            self._last_started = float("inf")
            self._report(Note("waiting for the cluster to have room for a worker (`ray status` says what is taken)"))

    def close(self) -> None:
        """Nothing to release: actors end with the connection at the latest."""


def _death(error: Exception) -> str:
    """Most telling line of Ray's long message about a lost actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "died" in line or "node" in line.lower()), lines[0] if lines else "")
    return f"a worker of the cluster was lost ({reason[:160] or type(error).__name__})"
