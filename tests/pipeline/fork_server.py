"""A process that has imported what commands import, and forks a child for each command that a test runs to its end.

Imports are most of what a small command costs. A forked command is the entry point itself, with a process, a session,
streams and an exit code of its own. Its workers are forks, too. Signals, kills, Ray and vLLM get new interpreters.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from capipe.models.engines.vllm import environment

from .forked import COMMAND, ForkedInterpreter, can_fork, import_all, run_entry_point

_Popen: Any = subprocess.Popen
ROOT = Path(__file__).resolve().parents[2]
OWN_INTERPRETER = ("vllm", "ray", "lance")  # words of commands with processes or threads that a fork would confuse
#: Variables, or beginnings of them, that no import of a command reads. Loading vLLM or Ray sets some for its processes,
#: and they stay set in the process of the tests.
READ_LATE = ("CAPIPE_CACHE", "PYTEST_CURRENT_TEST", "AWS_", "RAY_", *environment.REQUIRED, *environment.ENVIRONMENT)


class ForkServer:
    """The tests' side. One command at a time."""

    def __init__(self) -> None:
        self._environ = _read_by_imports(os.environ)
        self._lock = threading.Lock()
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.pipeline.fork_server import serve; serve()"
        command = [sys.executable, "-c", code]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def takes(self, words: Sequence[str], environ: Mapping[str, str]) -> bool:
        """Whether a fork does what a new interpreter would do with this command and environment."""
        return _read_by_imports(environ) == self._environ and not any(
            word == own or word.startswith(f"{own}=") for word in words for own in OWN_INTERPRETER
        )

    def run(
        self, words: Sequence[str], environ: Mapping[str, str], limit_s: float, said: Path
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. Raises TimeoutExpired. ``said``: a folder for its output."""
        said.mkdir(parents=True, exist_ok=True)
        files = [str(said / name) for name in ("stdout", "stderr")]
        with self._lock:
            request = {
                "words": [*words],
                "environ": {**environ},
                "cwd": str(Path.cwd()),
                "files": files,
                "limit_s": limit_s,
            }
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code = json.loads(self._process.stdout.readline())
            out, err = (Path(name).read_text(encoding="utf-8") for name in files)
        command = [sys.executable, *COMMAND, *words]
        if code is None:
            raise subprocess.TimeoutExpired(command, limit_s, out, err)
        return subprocess.CompletedProcess(command, code, out, err)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _read_by_imports(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(READ_LATE)}


class _ForkedOrProgram(_Popen):
    """`subprocess.Popen` of a forked command: our own interpreters are forks, anything else is started."""

    def __new__(cls, command: Sequence[str], **more: Any) -> Any:
        if can_fork(command) and not {"stdout", "stderr", "cwd", "input"} & set(more):
            return ForkedInterpreter(command, **more)
        return _Popen(command, **more)


def serve() -> None:
    """Read requests from stdin until it ends, and answer each with an exit code, or null where it took too long."""
    import_all()
    gc.freeze()  # or the first collection in a child touches, and so copies, all that it shares with us
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _command(request, requests, answers)
        print(json.dumps(_waited(pid, request["limit_s"])), file=answers, flush=True)


def _command(request: dict[str, Any], requests: TextIO, answers: TextIO) -> None:
    """In the child; never returns. Ends as an interpreter does, but for taking a thousand modules apart."""
    os.setsid()
    for stream in (requests, answers):
        os.close(stream.fileno())
    for fd, path in ((0, os.devnull), (1, request["files"][0]), (2, request["files"][1])):
        opened = os.open(path, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, fd)
        os.close(opened)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    subprocess.Popen = _ForkedOrProgram  # type: ignore[misc]
    forked = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forked  # type: ignore[assignment]
    code = 1
    try:
        code = run_entry_point(request["words"])
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _waited(pid: int, limit_s: float) -> int | None:
    """The exit code; what it left, and all of it where the time is over, is killed."""
    deadline, status = time.monotonic() + limit_s, None
    while status is None and time.monotonic() < deadline:
        done, told = os.waitpid(pid, os.WNOHANG)
        if done:
            status = told
        else:
            time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
        return None
    return os.waitstatus_to_exitcode(status)
