"""Tasks over worker processes for stages that live on the CPU: lazily drawn, retried, and drained on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...errors import CapipeError, RunFailed
from ...models.images.worker_process import Worker, WorkerDiedError
from ...terminal import print_err

Task = TypeVar("Task")
Result = TypeVar("Result")

ATTEMPTS = 3
_POLL_SECONDS = 0.5  # how late a stop request may be noticed


@dataclass(frozen=True, slots=True)
class Done(Generic[Task, Result]):
    task: Task
    result: Result


@dataclass(frozen=True, slots=True)
class Failed(Generic[Task]):
    """A task that failed :data:`ATTEMPTS` times. ``error``: the last reason in one line; ``details``: its traceback."""

    task: Task
    error: str
    details: str = ""


def worker_count(requested: int | None, shared: bool) -> int:
    """Processes for :func:`run_pool`: one per core by default, 0 where other processes cannot see the files."""
    if not shared:
        return 0
    return requested if requested is not None else len(os.sched_getaffinity(0))


def run_pool(
    tasks: Iterable[Task],
    function: Callable[[Task], Result],
    workers: int,
    stop: threading.Event | None = None,
    careful: Callable[[Task], Task] | None = None,
) -> Iterator[Done[Task, Result] | Failed[Task]]:
    """Run ``function`` on every task in ``workers`` processes; outcomes come as they finish.

    A task is drawn from ``tasks`` when a worker is free for it, never earlier. One whose worker died, or that raised,
    is tried again at once, in all :data:`ATTEMPTS` times; a :class:`CapipeError` is no accident: what is under way is
    finished, then it is raised. ``careful`` makes of a task whose worker died the one that is tried next.
    Once ``stop`` is set no task is drawn or retried, and what is under way is finished.
    ``workers=0`` runs everything in this process, for inputs and outputs that no other process can see.
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
    tasks: Iterable[Task], function: Callable[[Task], Result], stop: threading.Event
) -> Iterator[Done[Task, Result] | Failed[Task]]:
    for task in tasks:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                outcome: Done[Task, Result] | Failed[Task] = Done(task, function(task))
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
class _Slot(Generic[Task, Result]):
    """A worker and the task it is on for the ``attempt``-th time; the task is sent when the worker is ``ready``."""

    worker: Worker[Task, Result]
    task: Task
    attempt: int
    ready: bool


class _Pool(Generic[Task, Result]):
    def __init__(self, function: Callable[[Task], Result], careful: Callable[[Task], Task]) -> None:
        self._function, self._careful = function, careful
        self._slots: list[_Slot[Task, Result]] = []
        self._idle: list[Worker[Task, Result]] = []

    def run(
        self, tasks: Iterator[Task], workers: int, stop: threading.Event
    ) -> Iterator[Done[Task, Result] | Failed[Task]]:
        fatal: CapipeError | None = None
        while True:
            while not stop.is_set() and fatal is None and len(self._slots) < workers:
                try:
                    task = next(tasks)
                except StopIteration:
                    break
                self._start(task, 1)
            if not self._slots:
                break
            for slot in self._readable():
                if not slot.ready:
                    self._await_ready(slot)
                    continue
                try:
                    outcome = self._collect(slot)
                except CapipeError as error:  # the others may finish: killed, they would leave their scratch files
                    fatal = fatal or error
                    continue
                if isinstance(outcome, Failed) and slot.attempt < ATTEMPTS and not stop.is_set() and fatal is None:
                    _warn(outcome, slot.attempt)
                    self._start(outcome.task, slot.attempt + 1)
                else:
                    yield outcome
        if fatal is not None:
            raise fatal

    def _start(self, task: Task, attempt: int) -> None:
        """Put a task on an idle worker, or on a new one, which takes a moment to come up."""
        if self._idle:
            self._slots.append(_Slot(self._idle.pop(), task, attempt, ready=True))
            self._send(self._slots[-1])
        else:
            self._slots.append(_Slot(Worker(self._function), task, attempt, ready=False))

    def _await_ready(self, slot: _Slot[Task, Result]) -> None:
        try:
            slot.worker.wait_ready()
        except Exception as error:  # its imports may raise anything; no task is to blame
            raise RunFailed(f"a worker process did not start: {error}") from error
        slot.ready = True
        self._send(slot)

    def _send(self, slot: _Slot[Task, Result]) -> None:
        with contextlib.suppress(WorkerDiedError):  # raised again, and handled, when its answer is collected
            slot.worker.send(slot.task)

    def _readable(self) -> list[_Slot[Task, Result]]:
        with selectors.DefaultSelector() as selector:
            for slot in self._slots:
                selector.register(slot.worker.fileno(), selectors.EVENT_READ, slot)
            return [key.data for key, _ in selector.select(_POLL_SECONDS)]

    def _collect(self, slot: _Slot[Task, Result]) -> Done[Task, Result] | Failed[Task]:
        """What became of a slot's task. Its worker, if it lives on, is idle then."""
        outcome: Done[Task, Result] | Failed[Task]
        try:
            outcome = Done(slot.task, slot.worker.recv())
        except WorkerDiedError as death:
            slot.worker.kill()
            self._slots.remove(slot)
            return Failed(self._careful(slot.task), f"its worker process died: {death}")
        except CapipeError:
            self._release(slot)
            raise
        except Exception as error:  # the stage's own, from over there
            outcome = _failed(slot.task, error)
        self._release(slot)
        return outcome

    def _release(self, slot: _Slot[Task, Result]) -> None:
        self._slots.remove(slot)
        self._idle.append(slot.worker)

    def kill(self) -> None:
        for worker in [*self._idle, *(slot.worker for slot in self._slots)]:
            worker.kill()


def _failed(task: Task, error: Exception) -> Failed[Task]:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return Failed(task, text, "\n".join(getattr(error, "__notes__", [])) or "".join(traceback.format_exception(error)))


def _warn(failed: Failed[Task], attempt: int) -> None:
    print_err(f"attempt {attempt} of {ATTEMPTS} failed, trying again: {failed.error}")
