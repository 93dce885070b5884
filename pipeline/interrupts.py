"""Ctrl-C in two steps: the first asks a run to drain, the second ends it (journals have all that was finished)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interrupts(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """While the body runs, the first SIGINT or SIGTERM calls ``ask_to_stop``; the second raises KeyboardInterrupt.

    Only the main thread of a program gets signals; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        ask_to_stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
