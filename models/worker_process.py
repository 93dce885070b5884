"""Worker processes and their transport: pickled messages over a socket pair.

:class:`WorkerProcess` runs any function on its end of the socket (the local runner's workers); :class:`Worker` answers
one task at a time, so that a caller knows which task killed it (image decoders, the worker pool).

Workers are fresh interpreters that never import the caller's ``__main__``: a script needs no ``if __name__`` guard, and
a worker imports what its function needs and nothing else (no torch in an image decoder). They exit with their parent,
when the socket closes or, where they hang, by the kernel's death signal (:mod:`.child_processes`). They start with
SIGINT, SIGTERM and SIGHUP blocked: the parent handles signals.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from .child_processes import first_words

_BOOT = "from capipe.models.worker_process import run_worker; run_worker(int(sys.argv[1]))"
# One thread each: there are already as many workers as cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Task = TypeVar("Task")
Result = TypeVar("Result")


class HasFileno(Protocol):
    def fileno(self) -> int: ...


Source = TypeVar("Source", bound=HasFileno)


class WorkerDiedError(Exception):
    """The process exited or was killed before it answered; the message says how."""


class MessageSocket:
    """Pickled objects over a stream socket; large buffers (arrays) follow the pickle uncopied."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        """Whether this end was closed by us."""
        return self._socket.fileno() < 0

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
        """The next object. Raises EOFError where the other end is closed."""
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


def readable(sources: Iterable[Source], seconds: float) -> list[Source]:
    """Sources that have a message, or whose other end is closed, within ``seconds``."""
    with selectors.DefaultSelector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ, source)
        return [key.data for key, _ in selector.select(seconds)]


class WorkerProcess:
    """A process that runs ``main(socket)``, and our end of that socket.

    ``main``: a module's function, or a partial of one with picklable arguments. ``name``: ends its command line, for
    the process list. ``environment``: in addition to ours.
    """

    def __init__(
        self, main: Callable[[MessageSocket], object], name: str, environment: Mapping[str, str] | None = None
    ) -> None:
        ours, theirs = socket.socketpair()
        self.socket = MessageSocket(ours)
        command = [sys.executable, "-P", "-c", first_words() + _BOOT, str(theirs.fileno()), name]
        with theirs, _signals_blocked():
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
            )
        self.pid = self._process.pid
        with contextlib.suppress(OSError):  # it may already be dead, which receiving shows
            self.socket.send(main)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code, negative for a signal's number; None where it still runs after ``timeout`` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kill the process, and wait for its end."""
        self._process.kill()
        self._process.wait()


class Worker(Generic[Task, Result]):
    """A process that answers every ``send(task)`` with ``function(task)``, in order.

    ``function`` must be importable (a module's function, or a ``functools.partial`` of one with picklable arguments).
    """

    def __init__(self, function: Callable[[Task], Result]) -> None:
        self._process = WorkerProcess(answer_tasks, "capipe-task-worker", ONE_THREAD)
        self._socket = self._process.socket
        with contextlib.suppress(OSError):  # it may already be dead, which receiving shows
            self._socket.send(function)

    def fileno(self) -> int:
        """For ``select``: readable when an answer, or the end, is there."""
        return self._socket.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait for the function's import. Raises what that raised, or WorkerDiedError; call before the first send."""
        self.recv()

    def send(self, task: Task) -> None:
        """Send a task. Raises WorkerDiedError where the process is gone."""
        try:
            self._socket.send(task)
        except OSError:
            raise WorkerDiedError(self._ending()) from None

    def recv(self, timeout: float | None = None) -> Result:
        """The next answer; raises what the function raised, or WorkerDiedError (also after ``timeout`` seconds)."""
        self._socket.settimeout(timeout)
        try:
            sound, value = self._socket.recv()
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
        code = self._process.wait(timeout=5)
        if code is None:  # its socket is closed but it still runs, unusable
            self.kill()
            return "it closed its connection"
        if code >= 0:
            return f"it exited with code {code}"
        return f"it was killed by {signal.Signals(-code).name}"

    def close(self) -> None:
        """Let the process exit once its current task is done, and wait for that."""
        self._socket.close()
        self._process.wait()

    def kill(self) -> None:
        """Kill the process; a ``recv`` in another thread raises WorkerDiedError."""
        self._process.kill()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Children started in the body inherit the signal mask: Ctrl-C does not end them, even before their first line.

    Nor do SIGTERM, which a batch system sends to all processes of a job, and SIGHUP, which a terminal sends: the parent
    then drains its work, and needs its workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_worker(descriptor: int) -> None:
    """Entry point of a worker process: receive its main function, and run it."""
    os.set_inheritable(descriptor, False)  # an inherited copy in a child of ours would hide our end from the parent
    connection = MessageSocket(socket.socket(fileno=descriptor))
    try:
        main = connection.recv()
    except (EOFError, ConnectionError):  # the parent is gone
        return
    main(connection)


def answer_tasks(connection: MessageSocket) -> None:
    """Main function of a :class:`Worker`: receive its function, then answer tasks until the socket is closed."""
    try:
        sound, function = _result(connection.recv)
        connection.send((sound, None if sound else function))
        while sound:
            task = connection.recv()
            connection.send(_result(functools.partial(function, task)))
    except (EOFError, OSError):  # the parent is gone, or done with us
        return


def _result(call: Callable[[], Any]) -> tuple[bool, Any]:
    """``(True, value)``, or ``(False, exception)``: the parent handles any exception."""
    try:
        return True, call()
    except Exception as error:
        return False, _portable(error)


def _portable(error: Exception) -> Exception:
    """``error`` with its traceback as a note, or its text in a RuntimeError where it does not survive pickling."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception as reason:  # pickling can fail in any way
        return RuntimeError(f"{type(error).__name__}: {error} (not picklable: {reason})")
    return error
