"""Commands in processes forked from this one, so that torch is imported once; and files that are watched."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import multiprocessing
import os
import pkgutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capipe.pipeline import __main__

from .viewing import client_of

_Popen: Any = subprocess.Popen
MEGABYTE = 1 << 20
DEADLINE = 120.0  # seconds for one command on a few images
COMMAND = ["-m", "capipe.pipeline"]
IMPORTED = ("datasets", "open_clip", "transformers.models.auto", "py3langid", "jinja2", "webdataset")


@dataclass
class Outcome:
    """What one command did. ``memory``: bytes at its peak; ``said``: its output, in any order."""

    code: int
    said: str
    memory: int


def run(words: Sequence[object], cwd: Path) -> Outcome:
    """A command in a process forked from this one: Python and torch are imported once, not thousands of times."""
    with (cwd.parent / "said").open("w+b") as said:
        pid = os.fork()
        if pid == 0:
            _in_child([str(word) for word in words], cwd, said.fileno())
        code, memory = _waited(pid)
        said.seek(0)
        return Outcome(code, said.read(4 * MEGABYTE).decode(errors="replace"), memory)


def _waited(pid: int) -> tuple[int, int]:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what it left
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -999, 0


def _in_child(words: list[str], cwd: Path, output: int) -> None:
    """Never returns. New interpreters that the command starts are forks, too."""
    code = 70
    try:
        os.setsid()
        os.chdir(cwd)
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, own in ((null, 0), (output, 1), (output, 2)):
            os.dup2(fd, own)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(fd, "wb", 0), write_through=True) for fd in (1, 2))
        subprocess.Popen = ForkedInterpreter  # type: ignore[assignment,misc]
        forked = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method=None: forked  # type: ignore[assignment]
        code = _viewed(Path(words[1])) if words[0] == "view" else run_entry_point(words)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_entry_point(words: Sequence[str]) -> int:
    """`capipe` in this process; its exit code."""
    sys.argv = ["capipe", *words]
    try:
        __main__.main()
    except SystemExit as ended:
        return int(ended.code or 0) if isinstance(ended.code, int | None) else 1
    return 0


def _viewed(place: Path) -> int:
    """Everything that the page asks for, of every artifact: rows, whole rows, pictures, histograms."""
    client = client_of(place)
    answer = client.get("/api/catalog")
    assert answer.status_code < 500, answer.text[:2000]
    for artifact in answer.json().get("artifacts", []):
        name = {"a": artifact["id"]}
        asked = [("columns", {}), ("rows", {}), ("count", {"search": "a"}), ("histogram", {"column": "width"})]
        for path, more in asked:
            page = client.get(f"/api/{path}", params={**name, **more})
            assert page.status_code < 501, page.text[:2000]
            for row in (page.json().get("rows") or [])[:1] if path == "rows" else ():
                there = {**name, "shard": row["shard"], "row": row["row"]}
                assert client.get("/api/row", params=there).status_code < 501
                assert client.get("/api/image", params=there).status_code < 501
    return 0


def can_fork(words: Sequence[str]) -> bool:
    """Whether a command line is one of our interpreters."""
    return words[0] == sys.executable and ("-c" in words or list(words[1:3]) == COMMAND)


class ForkedInterpreter(_Popen):
    """`subprocess.Popen` for ``python -c code`` and ``python -m capipe.pipeline``: a fork that runs it.

    Anything else is refused.
    """

    def __init__(
        self,
        command: Sequence[str],
        pass_fds: Sequence[int] = (),
        env: Any = None,
        start_new_session: bool = False,
        preexec_fn: Callable[[], object] | None = None,
        **more: Any,
    ) -> None:
        words = list(map(str, command))
        if not can_fork(words):
            raise AssertionError(f"a command was run: {words}")
        self.args, self.returncode, self.stdin, self.stdout, self.stderr = command, None, None, None, None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, pass_fds, env, start_new_session, preexec_fn)

    def _run(
        self,
        words: list[str],
        pass_fds: Sequence[int],
        env: Any,
        start_new_session: bool,
        preexec_fn: Callable[[], object] | None,
    ) -> None:
        code = 70
        try:
            if start_new_session:
                os.setsid()
            if preexec_fn is not None:
                preexec_fn()
            keep = {0, 1, 2, *pass_fds}
            for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
                if fd not in keep:
                    with contextlib.suppress(OSError):
                        os.close(fd)
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            if words[1:3] == COMMAND:
                code = run_entry_point(words[3:])
            else:
                place = words.index("-c")
                sys.argv = ["-c", *words[place + 2 :]]
                exec(words[place + 1], {"__name__": "__main__"})
                code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                done, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self.returncode = -9
            else:
                if done:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.005)
        return self.returncode or 0

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        pass


def import_all() -> None:
    """Everything that a command may import, once, before the forks; a package that is not installed is passed over."""
    for package in ("manifests", "models", "stages", "trainer", "pipeline"):
        path = importlib.import_module(f"capipe.{package}").__path__
        for module in pkgutil.walk_packages(path, f"capipe.{package}.", onerror=lambda name: None):
            if not {"__main__", "vllm", "ray", "train"} & set(module.name.replace("_", ".").split(".")[2:]):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)
    for name in IMPORTED:
        importlib.import_module(name)


_OPENED, _CHANGED, _GONE = 0x20, 0x2, 0x400  # IN_OPEN, IN_MODIFY, IN_DELETE_SELF of inotify(7)
_EVENT = struct.Struct("iIII")


@contextlib.contextmanager
def watched(files: Sequence[Path]) -> Iterator[Callable[[], list[str]]]:
    """What is done to some files meanwhile, by whichever process or library; the function empties the list."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert handle >= 0
    names = {libc.inotify_add_watch(handle, os.fsencode(path), _OPENED | _CHANGED | _GONE): path for path in files}

    def events() -> list[str]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(handle, 1 << 16):
                while data:
                    watch, mask, _, length = _EVENT.unpack_from(data)
                    data = data[_EVENT.size + length :]
                    for bit, what in ((_OPENED, "read"), (_CHANGED, "written"), (_GONE, "deleted")):
                        if mask & bit:
                            found.append(f"{names[watch]} was {what}")
        return found

    try:
        yield events
    finally:
        os.close(handle)
