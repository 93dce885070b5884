"""Where a stage's workers are to be: this machine's processes, or actors of a Ray cluster."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import BadInput
from ..manifests.artifact import Artifact
from ..manifests.shards import InputShard
from .desk import Outcome
from .events import Event
from .inline import run_inline
from .runner import ProcessCrew
from .scheduler import Scheduler
from .worker import Stage

CONNECT_SECONDS = 5.0


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
class Workplace:
    """``gpus``: of this machine, one worker each, by their CUDA numbers (``0,1``: both); none: one worker on CPU."""

    gpus: tuple[str, ...] = ()
    ray: Ray | None = None

    def run(
        self, stage: Stage, artifact: Artifact, report: Callable[[Event], None], shards: list[InputShard]
    ) -> Outcome:
        """Do the shards here; returns when all are committed or quarantined, or on Ctrl-C."""
        if not (artifact.folder.is_shared and all(shard.is_shared for shard in shards)):
            return run_inline(stage, artifact, report, shards)
        if self.ray is None or not shards:
            return Scheduler(ProcessCrew(stage, artifact, self.gpus), artifact, report).run(shards)
        from .ray_runner import RayCrew, cluster

        with cluster(self.ray) as size:
            artifact.fence()
            return Scheduler(RayCrew(stage, artifact, size, report), artifact, report).run(shards)


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
        problem = _problem(asked)
        if problem is not None:
            text = f"{where} {asked}: {problem}; start one (`ray start --head`), or leave the address out"
            raise BadInput(f"{text} to have one started here")
        return Ray(asked, workers, gpu, gpus_each)
    found = _started_here()
    if found is None and asked == "auto":
        raise BadInput("--ray-address auto: no cluster runs on this machine; `ray start --head`, or leave it out")
    return Ray(found, workers, gpu, gpus_each)


def _started_here() -> str | None:
    """The head of the cluster that `ray start` left a note about; None where there is none, or it does not answer."""
    note = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray/ray_current_cluster"
    try:
        address = note.read_text().strip()
    except OSError:
        return None
    return address if _problem(address) is None else None


def _problem(address: str) -> str | None:
    """Why no head can be reached at an address, in a few words."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return "not HOST:PORT of a Ray head"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        return f"no Ray head answers there ({error})"
    return None
