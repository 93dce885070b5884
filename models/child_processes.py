"""Child processes that end with their parent, even when it is killed by SIGKILL.

The kernel does this (Linux, ``PR_SET_PDEATHSIG``): it kills a child when the *thread* that started it ends, even a
child that hangs in a system call, where no message would reach it. Start children from a thread that lives as long as
they are needed: the main thread, an event loop's, or one that waits for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.spawn
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..terminal import escape_logs

GRACE_SECONDS = 2.0  # for descendants of a killed process to end by themselves (death signal, closed pipes)
_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
#: A worker that was killed leaves semaphores to multiprocessing's tracker, which removes them, and says so afterwards:
#: after the command's last line, which is to be the reason of its end.
_TRACKER = "ignore:resource_tracker:UserWarning"
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a forked process must not load anything
_spawned_command = multiprocessing.spawn.get_command_line

Identity = tuple[int, str]  # pid and start time; a pid alone may have been reused


def follow(parent: int) -> None:
    """In a child: end with ``parent``, or at once where it is already gone. Does nothing outside Linux."""
    if _LIBC is None:
        return
    _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl took effect
        os._exit(1)


def first_words() -> str:
    """Python code that a child runs first: sets our import path, makes it and what it spawns end with its parent."""
    return (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from capipe.models.child_processes import begin; begin({os.getpid()}); "
    )


def begin(parent: int) -> None:
    """Set up a child process; called by the code of :func:`first_words`."""
    follow(parent)
    escape_logs()
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), _TRACKER]))
    multiprocessing.spawn.get_command_line = _following_command


@contextlib.contextmanager
def spawned_follow() -> Iterator[None]:
    """Makes processes spawned by :mod:`multiprocessing` in the body, by any library, follow their parent at once.

    Later would be too late: a killed command would leave behind an engine that is still loading its model.
    multiprocessing has no hook for this, so :func:`first_words` is prepended to the program on the children's command
    line.
    """
    before = multiprocessing.spawn.get_command_line
    multiprocessing.spawn.get_command_line = _following_command
    try:
        yield
    finally:
        multiprocessing.spawn.get_command_line = before


def _following_command(**options: object) -> list[str]:
    command: list[str] = _spawned_command(**options)
    if "-c" in command:  # absent in a frozen program
        index = command.index("-c") + 1
        command[index] = first_words() + command[index]
    return command


def descendants(pid: int) -> set[Identity]:
    """All live descendants of a process; empty where the system has no /proc."""
    children: dict[int, list[Identity]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        if (stat := _stat(path)) is not None:
            identity, parent = stat
            children.setdefault(parent, []).append(identity)
    family, heads = set[Identity](), [pid]
    while heads:
        below = children.get(heads.pop(), [])
        family.update(below)
        heads += [child for child, _ in below]
    return family


def end(family: Iterable[Identity], grace: float = GRACE_SECONDS) -> None:
    """Wait for processes to end, kill those that have not within ``grace`` seconds, and wait until all are gone."""
    left, deadline = set(family), time.monotonic() + grace
    while left := {identity for identity in left if _lives(identity)}:
        if time.monotonic() > deadline:
            for pid, _ in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline + GRACE_SECONDS:
                return  # stuck in the kernel (a driver), where SIGKILL has no effect
        time.sleep(0.02)


def _lives(identity: Identity) -> bool:
    stat = _stat(Path(f"/proc/{identity[0]}/stat"))
    return stat is not None and stat[0] == identity


def _stat(path: Path) -> tuple[Identity, int] | None:
    """A process's identity and its parent's pid; None where it is gone or a zombie."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name, in brackets, may hold anything
    if fields[0] in "ZX":
        return None
    return (int(path.parent.name), fields[19]), int(fields[1])
