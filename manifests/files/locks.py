"""Waiting for a lock of the kernel (`flock`) without hanging: a process that holds one may be stopped for hours.

A wait is reported after :data:`NOTICE_SECONDS`, ends when a stop is requested, and never blocks in the kernel, where a
signal's handler would not run.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import RunFailed
from ...terminal import print_err

NOTICE_SECONDS = 5.0
_POLL_SECONDS = 0.05


class LockHeld(RunFailed):
    """Another process holds the lock, and the wait was given up. ``waiting``: a line for who tries again."""

    def __init__(self, where: str, who: str) -> None:
        super().__init__(f"{where}: gave up waiting for {who}, which is writing there; run the same command to go on")
        self.waiting = f"{where}: waiting for {who}, which is writing there (if it was stopped: kill -CONT, or kill it)"


def _never() -> bool:
    return False


def _print(line: str) -> None:
    print_err(f"capipe: {line}")


@dataclass(frozen=True)
class Patience:
    """``seconds``: longest wait; ``stopped``: whether to give up now; ``say``: reports a long wait."""

    seconds: float = float("inf")
    stopped: Callable[[], bool] = _never
    say: Callable[[str], None] = _print


UNLIMITED = Patience()


def wait_for(handle: int, where: str, patience: Patience = UNLIMITED, holder: Callable[[], str] | None = None) -> None:
    """Lock an open file exclusively. ``where``: its folder or name; ``holder``: describes the process that has it.

    Raises LockHeld if the patience ends first.
    """
    started, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - started
        held = LockHeld(where, holder() if holder is not None else "another process")
        if patience.stopped() or waited > patience.seconds:
            raise held
        if waited > NOTICE_SECONDS and not said:
            said = True
            patience.say(held.waiting)
        time.sleep(_POLL_SECONDS if waited > _POLL_SECONDS else 0.001)
