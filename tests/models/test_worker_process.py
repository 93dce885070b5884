"""The transport of worker processes: messages both ways, the end of a process, and the signals it does not hear."""

from __future__ import annotations

import functools
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from capipe.models.worker_process import WorkerProcess, readable

MAINS = """
    import os, signal, sys

    def double(connection, *, code):
        connection.send(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        connection.send(connection.recv() * 2)
        connection.recv()
        sys.exit(code)
"""


@pytest.fixture
def mains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "worker_mains.py").write_text(textwrap.dedent(MAINS))
    monkeypatch.syspath_prepend(tmp_path)
    import worker_mains  # type: ignore[import-not-found]

    yield worker_mains
    del sys.modules["worker_mains"]


def test_messages_name_signals_and_exit_code(mains: ModuleType) -> None:
    process = WorkerProcess(functools.partial(mains.double, code=5), "a-name")
    assert process.socket.recv() == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    array = np.arange(1_000_000)  # more than a socket holds
    process.socket.send(array)
    doubled = process.socket.recv()
    assert (doubled == 2 * array).all() and doubled.flags.writeable
    assert Path(f"/proc/{process.pid}/cmdline").read_bytes().endswith(b"\0a-name\0")
    assert process.alive and process.wait(timeout=0.01) is None and readable([process.socket], 0.01) == []
    process.socket.send("go")
    assert readable([process.socket], 60) == [process.socket]
    with pytest.raises(EOFError):
        process.socket.recv()
    assert process.wait(60) == 5 and not process.alive
    process.socket.close()
    assert process.socket.closed


def test_a_killed_process(mains: ModuleType) -> None:
    process = WorkerProcess(functools.partial(mains.double, code=5), "a-name")
    process.kill()
    assert process.wait() == -signal.SIGKILL and not process.alive
    process.kill()  # a second time it does nothing
