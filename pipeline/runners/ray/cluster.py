"""The Ray cluster of a run: named by the user, running on this machine, or started for the run; and its room."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ....errors import BadInput
from ....manifests.files.tar import printable
from ....terminal import print_err
from .folders import address_problem, read_note


@dataclass(frozen=True)
class RayCluster:
    """Cluster settings. ``address``: HOST:PORT of the head; None: start one here. ``workers``: None: one per GPU, or
    one per machine without GPUs. ``gpu``: whether a worker takes ``gpus_each`` GPUs of a machine if the cluster has
    any. ``cores``: one worker per core instead, for tasks without a model."""

    address: str | None
    workers: int | None = None
    gpu: bool = True
    gpus_each: int = 1
    cores: bool = False


@dataclass(frozen=True)
class ClusterSize:
    """Number of a run's workers on a cluster, GPUs per worker, and machines."""

    workers: int
    gpus: int
    machines: int = 1


def ray_cluster(
    address: str | None, workers: int | None, gpu: bool, gpus_each: int = 1, *, cores: bool = False
) -> RayCluster:
    """The cluster named by ``--ray-address`` or $RAY_ADDRESS, else the one of `ray start` here, else one to be started.

    Raises BadInput if Ray is missing, or a named head does not answer.
    """
    if find_spec("ray") is None:
        raise BadInput("--runner ray: Ray is not installed; pip install 'capipe[ray]'")
    if workers is not None and workers < 1:
        raise BadInput(f"--ray-workers {workers}: at least 1")
    requested = address or os.environ.get("RAY_ADDRESS") or None
    if requested == "local":
        return RayCluster(None, workers, gpu, gpus_each, cores)
    if requested not in (None, "auto"):
        where = "--ray-address" if address else "RAY_ADDRESS"
        problem = address_problem(requested)
        if problem is not None:
            text = f"{where} {requested}: {problem}; start one (`ray start --head`), or leave the address out"
            raise BadInput(f"{text} to have one started here")
        return RayCluster(requested, workers, gpu, gpus_each, cores)
    running, ignored = _started_here()
    if running is None and requested == "auto":
        why = "no cluster runs on this machine" if ignored is None else f"its note is ignored, for {ignored}"
        raise BadInput(f"--ray-address auto: {why}; `ray start --head`, or leave it out")
    if ignored is not None:
        _warn_ignored(ignored)
    return RayCluster(running, workers, gpu, gpus_each, cores)


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


def cluster_size(config: RayCluster, gpus: Sequence[int], cores: int = 0) -> ClusterSize:
    """Size from the machines' GPU counts, and the number of their cores together.

    Raises BadInput if no machine has enough GPUs for a worker.
    """
    per_worker, machines = config.gpus_each, max(1, len(gpus))
    if config.cores:
        return ClusterSize(config.workers or max(1, cores), 0, machines)
    room = sum(count // per_worker for count in gpus) if config.gpu else 0
    if per_worker > 1 and not room:
        raise BadInput(
            f"--tensor-parallel {per_worker}: no machine of the cluster has so many GPUs (most: {max(gpus, default=0)})"
        )
    return ClusterSize(config.workers or room or machines, per_worker if room else 0, machines)
