"""Children that end with their parent, however that one ends: `kill -9` of a process leaves none of its children.

The kernel sees to it (Linux, ``PR_SET_PDEATHSIG``): it kills a child as soon as the *thread* that started it is gone,
even one that hangs in a system call, where no message would reach it. Start children from a thread that lives as long
as they are wanted: the main one, an event loop's, or one that waits for them.
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

GRACE_SECONDS = 2.0  # for a family whose head was killed to end by itself, as the kernel and closed pipes tell it to
_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a forked process must not load anything
_spawned_command = multiprocessing.spawn.get_command_line

Identity = tuple[int, str]  # pid and start time: a pid alone may be another process's by now


def follow(parent: int) -> None:
    """In a child: be killed when ``parent`` is, and at once where it is gone already. Nothing where it is no Linux."""
    if _LIBC is None:
        return
    _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def first_words() -> str:
    """What a Python child runs first: it has our import path and follows us, as what it spawns follows it."""
    return (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from capipe.models.child_processes import begin; begin({os.getpid()}); "
    )


def begin(parent: int) -> None:
    """See :func:`first_words`."""
    follow(parent)
    escape_logs()
    multiprocessing.spawn.get_command_line = _following_command


@contextlib.contextmanager
def spawned_follow() -> Iterator[None]:
    """What :mod:`multiprocessing` spawns in the body, by whichever library, follows its parent from its first line on.

    Later would be too late: a killed command would leave an engine that is still loading its model. multiprocessing has
    no hook for it, so the program that its children are given on their command line gets :func:`first_words`.
    """
    before = multiprocessing.spawn.get_command_line
    multiprocessing.spawn.get_command_line = _following_command
    try:
        yield
    finally:
        multiprocessing.spawn.get_command_line = before


def _following_command(**given: object) -> list[str]:
    command: list[str] = _spawned_command(**given)
    if "-c" in command:  # not so in a frozen program
        place = command.index("-c") + 1
        command[place] = first_words() + command[place]
    return command


def descendants(pid: int) -> set[Identity]:
    """All live processes below one; empty where the system has no /proc."""
    children: dict[int, list[Identity]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        if (found := _stat(path)) is not None:
            identity, parent = found
            children.setdefault(parent, []).append(identity)
    family, heads = set[Identity](), [pid]
    while heads:
        below = children.get(heads.pop(), [])
        family.update(below)
        heads += [each for each, _ in below]
    return family


def end(family: Iterable[Identity], grace: float = GRACE_SECONDS) -> None:
    """Wait for processes to end, kill those that do not within ``grace`` seconds, and wait until all are gone."""
    left, deadline = set(family), time.monotonic() + grace
    while left := {each for each in left if _lives(each)}:
        if time.monotonic() > deadline:
            for pid, _ in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline + GRACE_SECONDS:
                return  # in the kernel, where not even that reaches it: a driver's matter
        time.sleep(0.02)


def _lives(identity: Identity) -> bool:
    found = _stat(Path(f"/proc/{identity[0]}/stat"))
    return found is not None and found[0] == identity


def _stat(path: Path) -> tuple[Identity, int] | None:
    """Who a process is and its parent's pid; None where it is gone, be it a zombie that waits to be collected."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name, in brackets, may hold anything
    if fields[0] in "ZX":
        return None
    return (int(path.parent.name), fields[19]), int(fields[1])
