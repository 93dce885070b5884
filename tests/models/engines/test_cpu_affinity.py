"""Cores left to those who are bound to them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from capipe.models.engines.vllm.cpu_affinity import bound_cores, move_off, move_to

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
BOUND = "import os, sys, time; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True); time.sleep(60)"


@pytest.fixture
def bound() -> Iterator[int]:
    """A process that may run on the first core only."""
    process = subprocess.Popen([sys.executable, "-c", BOUND, str(CORES[0])], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.wait()
    process.stdout.close()


def test_everyone_else_leaves_a_bound_core(bound: int) -> None:
    here, there = os.sched_getaffinity(0), threading.Event()
    other = threading.Thread(target=there.wait)
    other.start()
    try:
        assert bound_cores([bound]) == {CORES[0]}
        move_off({CORES[0]}, [bound, os.getpid()])
        assert other.native_id is not None
        assert os.sched_getaffinity(0) == os.sched_getaffinity(other.native_id) == here - {CORES[0]}
        assert os.sched_getaffinity(bound) == {CORES[0]}  # has nowhere else to go
        move_to(here, [os.getpid()])
        assert os.sched_getaffinity(0) == os.sched_getaffinity(other.native_id) == here
    finally:
        move_to(here, [os.getpid()])
        there.set()
        other.join()


def test_nowhere_else_to_go_and_nobody_there() -> None:
    here = os.sched_getaffinity(0)
    move_off(here, [os.getpid(), 2**22 + 1])
    assert os.sched_getaffinity(0) == here
    assert bound_cores([2**22 + 1]) == set()
