"""CPU affinity: keeps other processes off the cores of an engine that computes on the CPU.

vLLM binds its model's threads to cores of their own but lets all other processes run anywhere, on these cores, too.
Whatever then takes a core from one of the model's threads delays every sequence in the batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path


def bound_cores(pids: Iterable[int]) -> set[int]:
    """The cores that threads of these processes are bound to, one core per thread."""
    masks = [_cores(thread) for pid in pids for thread in _threads(pid)]
    return {core for mask in masks if len(mask) == 1 for core in mask}


def move_off(cores: set[int], pids: Iterable[int]) -> None:
    """Move the threads of these processes, and all they start, off these cores.

    A thread that may run nowhere else, such as one bound to a single core, stays where it is.
    """
    for thread in chain.from_iterable(map(_threads, pids)):
        if rest := _cores(thread) - cores:
            _allow(thread, rest)


def move_to(cores: set[int], pids: Iterable[int]) -> None:
    """Let the threads of these processes, and all they start, run on these cores."""
    for thread in chain.from_iterable(map(_threads, pids)):
        _allow(thread, cores)


def _allow(thread: int, cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # it has ended, or this is not permitted
        os.sched_setaffinity(thread, cores)


def _threads(pid: int) -> list[int]:
    try:
        return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:  # the process has ended, or the system has no /proc
        return []


def _cores(thread: int) -> set[int]:
    try:
        return os.sched_getaffinity(thread)
    except OSError:
        return set()
