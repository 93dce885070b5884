"""Handlers of the signals that end a command: Ctrl-C (SIGINT), a scheduler's SIGTERM, a closing terminal's SIGHUP.

Before a command has begun, a signal ends it at once. A run that can drain does so at the first signal and ends at the
second; other commands end at once. Journals hold all finished rows. Imported before anything else: no heavy imports.
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

Handler = Callable[[int, FrameType | None], object] | int | None  # accepted and returned by :func:`signal.signal`
_received = signal.SIGINT  # last signal; SIGINT if a library's own handler got it
_interrupted = False


def begin() -> None:
    """Until the command begins, exit at once: an interrupted import would leave a traceback."""
    _install(_end_at_once)


def raise_on_signals() -> None:
    """Make signals raise KeyboardInterrupt from here on, so that open files and processes are closed."""
    _install(_raise)


def end() -> None:
    """Mark the command as over: a signal then ends its remaining threads and exit handlers silently."""
    _install(lambda number, frame: os._exit(128 + number))


def exit_code() -> int:
    """Exit code of a stopped command: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + _received


def broke_off() -> bool:
    """Whether a signal raised KeyboardInterrupt; the caller must then report the stop."""
    return _interrupted


def say(line: str) -> None:
    """Write to stderr if possible: fails silently on a closed terminal or during another write."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        print_err(line)


@contextmanager
def interrupts(request_stop: Callable[[], None]) -> Iterator[None]:
    """While the body runs, the first signal calls ``request_stop``; the second raises KeyboardInterrupt.

    Does nothing outside the main thread: only that one receives signals.
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
    """Install a handler for all signals; returns the previous handlers. An ignored SIGHUP stays ignored, for `nohup`.

    An ignored SIGINT does not: a script's shell ignores it for commands started with `&`, and a chain stops its
    commands with it.
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
