"""Pool of worker processes for CPU stages: lazy task iteration, retries, draining on Ctrl-C."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from ...errors import CapipeError, DamagedShard, RunFailed
from ...models.worker_process import Worker, WorkerDiedError, readable
from ...terminal import print_err

Task = TypeVar("Task")
Result = TypeVar("Result")

ATTEMPTS = 3
_POLL_SECONDS = 0.5  # between checks for a stop request


@dataclass(frozen=True, slots=True)
class Done(Generic[Task, Result]):
    task: Task
    result: Result


@dataclass(frozen=True, slots=True)
class Failed(Generic[Task]):
    """A task that failed :data:`ATTEMPTS` times. ``error``: last reason, one line; ``details``: its traceback;
    ``final``: another attempt cannot succeed."""

    task: Task
    error: str
    details: str = ""
    final: bool = False


class Wait(Enum):
    """In place of a task: none is free at the moment, but there may be one later."""

    WAIT = "wait"


WAIT = Wait.WAIT


def run_pool(
    tasks: Iterable[Task | Wait],
    function: Callable[[Task], Result],
    workers: int,
    stop: threading.Event | None = None,
    careful: Callable[[Task], Task] | None = None,
) -> Iterator[Done[Task, Result] | Failed[Task]]:
    """Run ``function`` on every task in ``workers`` processes; yields results in the order of completion.

    The next task is taken from ``tasks`` only when a worker is free; :data:`WAIT` there: it is asked for again later.
    A task that raised or whose worker died is retried at once, up to :data:`ATTEMPTS` times in all, and not after a
    :class:`DamagedShard`; any other
    :class:`CapipeError` is raised once the running tasks are finished.
    ``careful``: maps a task whose worker died to the task to retry.
    Once ``stop`` is set no task is started or retried, and running tasks are finished.
    ``workers=0`` runs everything in this process, for files that other processes cannot see.
    """
    stop = stop or threading.Event()
    if workers == 0:
        yield from _run_here(tasks, function, stop)
        return
    pool = _Pool(function, careful or (lambda task: task))
    try:
        yield from pool.run(iter(tasks), workers, stop)
    finally:
        pool.kill()


def _run_here(
    tasks: Iterable[Task | Wait], function: Callable[[Task], Result], stop: threading.Event
) -> Iterator[Done[Task, Result] | Failed[Task]]:
    for task in tasks:
        if isinstance(task, Wait):
            if stop.wait(_POLL_SECONDS):
                return
            continue
        for attempt in range(1, ATTEMPTS + 1):
            try:
                outcome: Done[Task, Result] | Failed[Task] = Done(task, function(task))
                break
            except DamagedShard as error:
                outcome = Failed(task, str(error), final=True)
                break
            except CapipeError:
                raise
            except Exception as error:
                outcome = _failed(task, error)
                if stop.is_set():
                    return
                _warn(outcome, attempt)
        yield outcome
        if stop.is_set():
            return


@dataclass
class _Attempt(Generic[Task, Result]):
    """The ``number``-th attempt at a task by a worker; the task is sent once the worker is ``ready``."""

    worker: Worker[Task, Result]
    task: Task
    number: int
    ready: bool

    def fileno(self) -> int:
        return self.worker.fileno()


class _Pool(Generic[Task, Result]):
    def __init__(self, function: Callable[[Task], Result], careful: Callable[[Task], Task]) -> None:
        self._function, self._careful = function, careful
        self._running: list[_Attempt[Task, Result]] = []
        self._idle: list[Worker[Task, Result]] = []

    def run(
        self, tasks: Iterator[Task | Wait], workers: int, stop: threading.Event
    ) -> Iterator[Done[Task, Result] | Failed[Task]]:
        fatal: CapipeError | None = None
        while True:
            waiting = False
            while not stop.is_set() and fatal is None and len(self._running) < workers:
                task = next(tasks, None)
                waiting = isinstance(task, Wait)
                if task is None or isinstance(task, Wait):
                    break
                self._start(task, 1)
            if not self._running and not waiting:
                break
            for attempt in readable(self._running, _POLL_SECONDS):
                if not attempt.ready:
                    self._await_ready(attempt)
                    continue
                try:
                    outcome = self._collect(attempt)
                except CapipeError as error:  # the others finish: killed, they would leave their temporary files
                    fatal = fatal or error
                    continue
                again = attempt.number < ATTEMPTS and not stop.is_set() and fatal is None
                if isinstance(outcome, Failed) and not outcome.final and again:
                    _warn(outcome, attempt.number)
                    self._start(outcome.task, attempt.number + 1)
                else:
                    yield outcome
        if fatal is not None:
            raise fatal

    def _start(self, task: Task, number: int) -> None:
        """Assign a task to an idle worker, or to a new one, which takes a moment to start."""
        if self._idle:
            self._running.append(_Attempt(self._idle.pop(), task, number, ready=True))
            self._send(self._running[-1])
        else:
            self._running.append(_Attempt(Worker(self._function), task, number, ready=False))

    def _await_ready(self, attempt: _Attempt[Task, Result]) -> None:
        try:
            attempt.worker.wait_ready()
        except Exception as error:  # the worker's imports may raise anything; not the task's fault
            raise RunFailed(f"a worker process did not start: {error}") from error
        attempt.ready = True
        self._send(attempt)

    def _send(self, attempt: _Attempt[Task, Result]) -> None:
        with contextlib.suppress(WorkerDiedError):  # raised again, and handled, when the answer is collected
            attempt.worker.send(attempt.task)

    def _collect(self, attempt: _Attempt[Task, Result]) -> Done[Task, Result] | Failed[Task]:
        """Result of an attempt. Its worker becomes idle, unless it died."""
        outcome: Done[Task, Result] | Failed[Task]
        try:
            outcome = Done(attempt.task, attempt.worker.recv())
        except WorkerDiedError as death:
            attempt.worker.kill()
            self._running.remove(attempt)
            return Failed(self._careful(attempt.task), f"its worker process died: {death}")
        except DamagedShard as error:
            outcome = Failed(attempt.task, str(error), final=True)
        except CapipeError:
            self._release(attempt)
            raise
        except Exception as error:  # raised by the stage in the worker
            outcome = _failed(attempt.task, error)
        self._release(attempt)
        return outcome

    def _release(self, attempt: _Attempt[Task, Result]) -> None:
        self._running.remove(attempt)
        self._idle.append(attempt.worker)

    def kill(self) -> None:
        for worker in [*self._idle, *(attempt.worker for attempt in self._running)]:
            worker.kill()


def _failed(task: Task, error: Exception) -> Failed[Task]:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return Failed(task, text, "\n".join(getattr(error, "__notes__", [])) or "".join(traceback.format_exception(error)))


def _warn(failed: Failed[Task], attempt: int) -> None:
    print_err(f"attempt {attempt} of {ATTEMPTS} failed, trying again: {failed.error}")
