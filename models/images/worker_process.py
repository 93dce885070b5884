"""A worker process that runs one function on one message at a time, so whoever is waiting knows what killed it.

Workers are fresh interpreters that never import the caller's ``__main__``: a script needs no ``if __name__`` guard, and
a worker holds what its function imports and nothing else (no torch in an image decoder). They end when their parent
does, by the end of their socket or, where they hang, by the kernel's hand, and leave Ctrl-C to the parent.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from ..child_processes import first_words

_BOOT = "from capipe.models.images.worker_process import serve; serve(int(sys.argv[1]))"
# One thread each: there are as many workers as cores already.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDiedError(Exception):
    """The process ended, or was ended, before it answered; the message says how."""


class Channel:
    """Pickled objects over a stream socket; large buffers (arrays) follow the pickle uncopied."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def settimeout(self, seconds: float | None) -> None:
        """Let ``recv`` raise TimeoutError when nothing arrives for that long."""
        self._socket.settimeout(seconds)

    def send(self, value: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        payload = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        sizes = [len(payload), *(len(view) for view in views)]
        self._socket.sendall(struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes) + payload)
        for view in views:
            self._socket.sendall(view)

    def recv(self) -> Any:
        """The next object. Raises EOFError when the other side is gone."""
        (count,) = struct.unpack("<I", self._read(4))
        sizes = struct.unpack(f"<{count}Q", self._read(8 * count))
        payload, *buffers = [self._read(size) for size in sizes]
        return pickle.loads(payload, buffers=buffers)

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return data

    def close(self) -> None:
        self._socket.close()


class Worker(Generic[Task, Result]):
    """A process that answers every ``send(task)`` with ``function(task)``, in order.

    ``function`` must be importable (a module's function, or a ``functools.partial`` of one with picklable arguments).
    """

    def __init__(self, function: Callable[[Task], Result]) -> None:
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        command = [sys.executable, "-P", "-c", first_words() + _BOOT, str(theirs.fileno())]
        with theirs, _interrupts_blocked():
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, **_ENVIRONMENT}
            )
        with contextlib.suppress(OSError):  # it may be dead already; receiving will tell
            self._channel.send(function)

    def fileno(self) -> int:
        """For ``select``: readable when an answer, or the end, is there."""
        return self._channel.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait for the function's import. Raises what that raised, or WorkerDiedError; call before the first send."""
        self.recv()

    def send(self, task: Task) -> None:
        """Hand over a task. Raises WorkerDiedError if there is nobody to take it."""
        try:
            self._channel.send(task)
        except OSError:
            raise WorkerDiedError(self._ending()) from None

    def recv(self, timeout: float | None = None) -> Result:
        """The next answer; raises what the function raised, or WorkerDiedError (also after ``timeout`` seconds)."""
        self._channel.settimeout(timeout)
        try:
            sound, value = self._channel.recv()
        except TimeoutError:
            self.kill()
            raise WorkerDiedError(f"no answer within {timeout:g} s") from None
        except (OSError, EOFError):
            raise WorkerDiedError(self._ending()) from None
        if not sound:
            raise value
        result: Result = value
        return result

    def _ending(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # its socket is gone, but not the process: of no use any more
            self.kill()
            return "it closed its connection"
        if code >= 0:
            return f"it exited with code {code}"
        return f"it was killed by {signal.Signals(-code).name}"

    def close(self) -> None:
        """End the process once its present task is done."""
        self._channel.close()
        self._process.wait()

    def kill(self) -> None:
        """End the process at once; a ``recv`` in another thread raises WorkerDiedError."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A child inherits the signal mask: started in here, it never sees Ctrl-C, not even before its first line.

    Nor SIGTERM, which a batch system sends to all processes of a job, and SIGHUP, which a terminal does: the parent
    drains then, and needs its workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(descriptor: int) -> None:
    """The worker's life: receive the function, then answer tasks until the parent closes the socket."""
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        sound, function = _result(channel.recv)
        channel.send((sound, None if sound else function))
        while sound:
            task = channel.recv()
            channel.send(_result(functools.partial(function, task)))
    except (EOFError, OSError):  # the parent is gone, or done with us
        return


def _result(call: Callable[[], Any]) -> tuple[bool, Any]:
    """``(True, value)``, or ``(False, exception)``: whatever it is, the parent is to see it."""
    try:
        return True, call()
    except Exception as error:
        return False, _portable(error)


def _portable(error: Exception) -> Exception:
    """``error`` with its traceback as a note, or its text in a RuntimeError where it does not survive pickling."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception as reason:  # any class can fail here, in any way
        return RuntimeError(f"{type(error).__name__}: {error} (not picklable: {reason})")
    return error
