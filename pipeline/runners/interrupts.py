"""Signals that end a command: Ctrl-C (SIGINT), a scheduler's SIGTERM, the SIGHUP of a terminal that closes.

Before a command has begun they end it at once. A run that can drain does so at the first and ends at the second; other
commands end where they are. Journals hold all finished rows. Imported before anything else, so without heavy imports.
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
_interrupted = False


def begin() -> None:
    """Until the command begins, exit at once: an interrupted import would leave a traceback."""
    _install(_end_at_once)


def raise_on_signals() -> None:
    """From here on signals raise KeyboardInterrupt, so that open files and processes are closed."""
    _install(_raise)


def end() -> None:
    """The command is over: a signal ends its remaining threads and exit handlers silently."""
    _install(lambda number, frame: os._exit(128 + number))


def exit_code() -> int:
    """Of a command that was stopped: 130 by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP."""
    return 128 + _received


def broke_off() -> bool:
    """Whether a signal raised KeyboardInterrupt; then the caller has still to report the stop."""
    return _interrupted


def say(line: str) -> None:
    """Write to stderr, where possible: not on a closed terminal, nor while another write is under way."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        print_err(line)


@contextmanager
def interrupts(request_stop: Callable[[], None]) -> Iterator[None]:
    """While the body runs, the first signal calls ``request_stop``; the second raises KeyboardInterrupt.

    Does nothing outside the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requested = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            _raise(number, frame)
        _note(number)
        requested = True
        request_stop()

    before = _install(handle)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _install(handler: Handler) -> dict[signal.Signals, Handler]:
    """Returns the previous handlers. An ignored SIGHUP stays ignored, for `nohup`.

    Not so SIGINT: a script's shell ignores it for commands started with `&`, and a chain stops its commands by it.
    """
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set[signal.Signals]()
    return {number: signal.signal(number, handler) for number in SIGNALS if number not in ignored}


def _note(number: int) -> None:
    global _received
    _received = signal.Signals(number)
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:  # the terminal is gone: each line to it would raise while the run drains
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), descriptor)


def _raise(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _note(number)
    _interrupted = True
    raise KeyboardInterrupt


def _end_at_once(number: int, frame: FrameType | None) -> None:
    say("capipe: stopped before it had begun")
    os._exit(128 + number)
