"""Assignment of GPUs to a command's engines, and the number of decoding processes for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

from ...errors import BadInput
from ...terminal import print_err
from ..runners.decoders import AUTO, decoders_of
from ..runners.placement import Placement


def visible_gpus(option: str | None) -> list[str]:
    """CUDA numbers of the GPUs to use: ``--gpus``, else all visible ones; an empty list if there are none."""
    if option is not None:
        names = [name.strip() for name in option.split(",") if name.strip()]
        return [""] if names in ([], ["none"]) else names  # one worker without GPU
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    import torch  # queries the driver without initializing CUDA in this process

    return [str(i) for i in range(torch.cuda.device_count())]


def default_decode_workers(place: Placement) -> int:
    """Decoding processes per engine, from this machine's cores; on a cluster from those of each worker's machine."""
    if place.ray is not None:
        return AUTO
    return decoders_of(len(os.sched_getaffinity(0)), len(place.gpus))


def gpu_groups(names: Sequence[str], size: int) -> tuple[str, ...]:
    """Groups of GPUs, one per engine, in the format of CUDA_VISIBLE_DEVICES; prints which are left over.

    Raises BadInput if there are not enough for one group.
    """
    if size == 1:
        return tuple(names)
    names = [name for name in names if name]
    if len(names) < size:
        there = f"only GPU {', '.join(names)}" if names else "no GPU; vLLM's CPU backend is run by one process here"
        raise BadInput(f"--tensor-parallel {size}: there is {there}")
    whole = len(names) - len(names) % size
    if names[whole:]:
        _say_once(f"capipe: --tensor-parallel {size}: GPU {', '.join(names[whole:])} left over")
    return tuple(",".join(names[at : at + size]) for at in range(0, whole, size))


@cache
def _say_once(line: str) -> None:
    """Print a line once: a command may request placements for two models."""
    print_err(line)
