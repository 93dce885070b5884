"""The process pool: every task has one outcome, whatever happens to its worker."""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from capipe.errors import BadInput, RunFailed
from capipe.pipeline.runners.pool import ATTEMPTS, Done, Failed, run_pool

# Runs in the workers. Tasks are (what to do, a folder to leave marks in, a number).
WORK = """
    import os, signal, time
    from pathlib import Path
    from capipe.errors import BadInput

    class Unpicklable(Exception):
        def __init__(self, a, b):
            super().__init__(a)

    def act(task):
        what, folder, number = task
        tries = len(list(Path(folder).glob(f"{number}.*"))) + 1
        (Path(folder) / f"{number}.{tries}").touch()
        if what == "die" or (what == "die once" and tries == 1) or (what == "die twice" and tries < 3):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise ValueError(f"bad shard {number}")
        if what == "raise oddly":
            raise Unpicklable(1, 2)
        if what == "bad input":
            raise BadInput("no such column")
        if what == "slow":
            time.sleep(0.5)
        return number, os.getpid()
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "pool_work.py").write_text(textwrap.dedent(WORK))
    monkeypatch.syspath_prepend(tmp_path)
    import pool_work  # type: ignore[import-not-found]

    yield pool_work
    del sys.modules["pool_work"]


def marks(folder: Path, number: int) -> int:
    return len(list(folder.glob(f"{number}.*")))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_task_has_one_outcome(work: ModuleType, tmp_path: Path, workers: int) -> None:
    tasks = [("ok", str(tmp_path), number) for number in range(20)]
    outcomes = list(run_pool(tasks, work.act, workers))
    assert sorted(outcome.task[2] for outcome in outcomes) == list(range(20))
    assert all(isinstance(outcome, Done) and outcome.result[0] == outcome.task[2] for outcome in outcomes)
    processes = {outcome.result[1] for outcome in outcomes if isinstance(outcome, Done)}
    assert len(processes) <= max(workers, 1)


def test_a_dead_worker_is_replaced_and_its_task_retried(
    work: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whats = ["ok", "die once", "ok", "die", "die twice", "ok"]
    outcomes = list(run_pool([(what, str(tmp_path), n) for n, what in enumerate(whats)], work.act, 2))
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    assert [outcome.task[2] for outcome in failed] == [3]
    assert "SIGKILL" in failed[0].error
    assert sorted(outcome.task[2] for outcome in outcomes if isinstance(outcome, Done)) == [0, 1, 2, 4, 5]
    assert [marks(tmp_path, n) for n in range(6)] == [1, 2, 1, ATTEMPTS, 3, 1]
    assert "attempt 1 of 3 failed" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_is_retried_then_reported_with_its_traceback(
    work: ModuleType, tmp_path: Path, workers: int
) -> None:
    tasks = [("raise", str(tmp_path), 0), ("raise oddly", str(tmp_path), 1), ("ok", str(tmp_path), 2)]
    first, second, third = run_pool(tasks, work.act, workers)
    assert isinstance(first, Failed) and first.error == "ValueError: bad shard 0"
    assert "pool_work.py" in first.details and marks(tmp_path, 0) == ATTEMPTS
    assert isinstance(second, Failed) and "Unpicklable" in second.error
    assert isinstance(third, Done)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_meant_for_the_user_ends_the_run(work: ModuleType, tmp_path: Path, workers: int) -> None:
    with pytest.raises(BadInput, match="no such column"):
        list(run_pool([("bad input", str(tmp_path), 0), ("ok", str(tmp_path), 1)], work.act, workers))
    assert marks(tmp_path, 0) == 1


def test_what_runs_beside_a_fatal_error_is_finished_first(work: ModuleType, tmp_path: Path) -> None:
    tasks = [
        ("slow", str(tmp_path), 0),
        ("bad input", str(tmp_path), 1),
        *(("ok", str(tmp_path), n) for n in range(2, 9)),
    ]
    outcomes = []
    with pytest.raises(BadInput, match="no such column"):
        for outcome in run_pool(tasks, work.act, 2):
            outcomes.append(outcome.task[2])
    assert outcomes == [0]
    assert marks(tmp_path, 2) == 0


def test_tasks_are_drawn_only_when_a_worker_is_free(work: ModuleType, tmp_path: Path) -> None:
    drawn = 0

    def tasks() -> Iterator[tuple[str, str, int]]:
        nonlocal drawn
        for drawn in range(1, 11):
            yield "slow", str(tmp_path), drawn

    outcomes = run_pool(tasks(), work.act, 2)
    finished = 0
    for finished, _ in enumerate(outcomes, 1):
        assert drawn <= finished + 2
    assert finished == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_finishes_what_runs_and_draws_no_more(work: ModuleType, tmp_path: Path, workers: int) -> None:
    stop = threading.Event()
    outcomes = []
    for outcome in run_pool((("slow", str(tmp_path), n) for n in range(100)), work.act, workers, stop):
        outcomes.append(outcome)
        stop.set()
    assert all(isinstance(outcome, Done) for outcome in outcomes)
    started = {path.name.partition(".")[0] for path in tmp_path.glob("*.*") if path.suffix != ".py"}
    assert len(outcomes) == len(started) <= max(workers, 1) + 1


def test_leaving_early_ends_the_workers(work: ModuleType, tmp_path: Path) -> None:
    outcomes = run_pool([("ok", str(tmp_path), 0), ("slow", str(tmp_path), 1)] * 20, work.act, 2)
    first = next(outcomes)
    assert isinstance(first, Done)
    outcomes.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while Path(f"/proc/{first.result[1]}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{first.result[1]}").exists()


def test_a_function_that_cannot_be_imported_ends_the_run(
    work: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    with pytest.raises(RunFailed, match="did not start"):
        list(run_pool([("ok", str(tmp_path), 0)], work.act, 1))
