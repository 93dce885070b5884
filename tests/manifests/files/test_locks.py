"""Waits for locks of the kernel: they are reported, and end."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from capipe.manifests.files import locks
from capipe.manifests.files.locks import LockHeld, Patience, wait_for
from capipe.manifests.files.storage import Folder, append_line
from capipe.manifests.sharing.guard import guard
from capipe.models.engines import lora

HOLDER = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
#: Whatever waits for a lock, in a process of its own: the path of the lock, and the code.
WAITS = {
    "append_line": ("lines", "from capipe.manifests.files.storage import append_line; append_line(path, b'mine')"),
    "guard": (
        "_capipe/guard",
        "from capipe.manifests.files.storage import Folder; from capipe.manifests.sharing.guard import guard\n"
        "with guard(Folder(str(path.parent.parent))): pass",
    ),
    "lora": (
        "merged.lock",
        "from capipe.models.engines.lora import _locked\nwith _locked(path.with_name('merged')): pass",
    ),
}


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A file that another process has locked."""
    path = tmp_path / "lines"
    with hold(path):
        yield path


def hold(path: Path) -> subprocess.Popen[str]:
    path.parent.mkdir(exist_ok=True)
    words = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("what", WAITS)
def test_whatever_waits_says_so_and_ends_by_a_signal(what: str, tmp_path: Path) -> None:
    name, code = WAITS[what]
    path = tmp_path / name
    words = "import sys; from pathlib import Path; from capipe.manifests.files import locks; locks.NOTICE_SECONDS = 0.1"
    command = [sys.executable, "-c", f"{words}; path = Path(sys.argv[1])\n{code}", str(path)]
    with hold(path), subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        assert re.match(r"capipe: .*: waiting for another process, which is writing there", waiting.stderr.readline())
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(10) == -signal.SIGTERM


def test_the_holder_of_the_guard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "NOTICE_SECONDS", 0.05)
    said: list[str] = []
    folder, refused = Folder(str(tmp_path)), rf"gave up waiting for process {os.getpid()} on"
    with guard(folder), pytest.raises(LockHeld, match=refused), guard(folder, Patience(0.3, say=said.append)):
        pass
    assert len(said) == 1 and f"{tmp_path}: waiting for process {os.getpid()} on " in said[0]


def test_a_wait_ends_when_a_stop_is_requested(held: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    handle = os.open(held, os.O_RDWR)
    started = time.monotonic()
    with pytest.raises(LockHeld):
        wait_for(handle, "here", Patience(stopped=stop.is_set))
    assert time.monotonic() - started >= 0.2
    os.close(handle)


def test_it_is_locked_once_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    holder = hold(path)
    thread = threading.Thread(target=append_line, args=(path, b"mine"))
    thread.start()
    time.sleep(0.2)
    assert path.read_bytes() == b""
    holder.kill()
    thread.join(10)
    assert path.read_bytes() == b"mine\n"
    holder.communicate()


def test_no_lock_of_the_kernel_blocks() -> None:
    """A blocking flock does not end by a signal's handler: nothing of the package waits in one."""
    root = Path(locks.__file__).parents[2]
    blocking = re.compile(r"fcntl\.(flock|lockf)\((?![^)]*LOCK_(NB|UN))")
    files = [
        file
        for part in ("manifests", "models", "stages", "trainer", "pipeline")
        for file in (root / part).rglob("*.py")
    ]
    assert [file for file in files if blocking.search(file.read_text(encoding="utf-8"))] == []
    assert blocking.search("fcntl.flock(handle, fcntl.LOCK_EX)") and lora.__file__ in map(str, files) and fcntl.LOCK_NB
