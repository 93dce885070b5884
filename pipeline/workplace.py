"""Where a stage's workers are to be: this machine's processes, or actors of a Ray cluster."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..errors import BadInput
from ..manifests.artifact import Artifact
from ..manifests.shards import InputShard
from ..manifests.tar import printable
from ..terminal import print_err
from .desk import Outcome
from .events import Event
from .inline import run_inline
from .ray_folders import address_problem, read_note
from .runner import ProcessCrew
from .scheduler import Scheduler
from .worker import Stage


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
