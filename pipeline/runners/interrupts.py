"""Signals that end a command: Ctrl-C (SIGINT), a scheduler's SIGTERM, the SIGHUP of a terminal that closes.

Before a command has begun they end it at once. Of a run that can drain, the first asks it to and the second ends it;
anything else ends where it is. Journals have all that was finished. Light: it is imported before anything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ...terminal import print_err

STOPPED = "stopped; what was finished is kept, run the same command to go on"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CODES = frozenset(128 + number for number in SIGNALS)  # exit codes of commands that were stopped

Handler = Callable[[int, FrameType | None], object] | int | None  # as :func:`signal.signal` takes and returns them
_received = signal.SIGINT  # the last one; SIGINT where a library's own handler got it
_broke_off = False


def begin() -> None:
    """Until the command begins: imports take seconds, and one that is broken off leaves a traceback."""
    _install(_end_at_once)


def raise_on_signals() -> None:
    """From here on signals raise KeyboardInterrupt, so that what is open is closed."""
    _install(_raise)


def end() -> None:
    """The command is over: a signal ends what is left of it, atexit handlers and threads, without a word."""
    _install(lambda number, frame: os._exit(128 + number))


def exit_code() -> int:
    """Of a command that was stopped: 130 by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP."""
    return 128 + _received


def broke_off() -> bool:
    """Whether a signal raised KeyboardInterrupt, so that nobody has said yet that the command was stopped."""
    return _broke_off


def say(line: str) -> None:
    """Write to stderr, or nowhere: a terminal that was closed takes nothing, nor a stream that is being written to."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        print_err(line)


@contextmanager
def interrupts(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """While the body runs, the first signal calls ``ask_to_stop``; the second raises KeyboardInterrupt.

    Only the main thread of a program gets signals; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            _raise(number, frame)
        _note(number)
        asked = True
        ask_to_stop()

    before = _install(handle)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _install(handler: Handler) -> dict[signal.Signals, Handler]:
    """Returns the handlers there were. A hangup that is ignored, as `nohup` has it, stays ignored.

    Not so Ctrl-C: a script's shell has what it starts by `&` ignore it, and a chain stops its commands by it.
    """
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set[signal.Signals]()
    return {number: signal.signal(number, handler) for number in SIGNALS if number not in ignored}


def _note(number: int) -> None:
    global _received
    _received = signal.Signals(number)
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:  # of a terminal that is gone: each line to it would raise, and the run is to be drained
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), descriptor)


def _raise(number: int, frame: FrameType | None) -> None:
    global _broke_off
    _note(number)
    _broke_off = True
    raise KeyboardInterrupt


def _end_at_once(number: int, frame: FrameType | None) -> None:
    say("capipe: stopped before it had begun")
    os._exit(128 + number)
