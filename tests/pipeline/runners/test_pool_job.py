"""The job over worker processes: its events, its quarantine, and the errors that end it."""

from __future__ import annotations

import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from capipe.errors import RunFailed
from capipe.manifests.artifact import Artifact
from capipe.pipeline.runners.messages import Event, Pulse, ShardDone, ShardFailed
from capipe.pipeline.runners.placement import TaskPlacement
from capipe.pipeline.runners.pool_job import run_pool_job
from capipe.pipeline.runners.shard_queue import JobResult

# Runs in the workers. Tasks are (shard, what to do).
WRITERS = """
    import errno, os
    from capipe.manifests.manifest import ShardRecord

    def record(shard):
        return ShardRecord(shard, {"ok": len(shard)}, {}, {"digest": "d"}, "f")

    def write(task, artifact):
        shard, action = task
        if action.startswith("E"):
            with open(os.path.join(artifact.url, f"tries.{shard}"), "a") as file:
                file.write(".")
            raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)))
        return [record(f"{shard}-{part}") for part in "ab"] if action == "two" else record(shard)
"""


@pytest.fixture
def writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "pool_writers.py").write_text(textwrap.dedent(WRITERS))
    monkeypatch.syspath_prepend(tmp_path)
    import pool_writers  # type: ignore[import-not-found]

    yield pool_writers
    del sys.modules["pool_writers"]


@pytest.fixture
def artifact(tmp_path: Path) -> Iterator[Artifact]:
    artifact = Artifact.create(str(tmp_path / "out"), "test", {}, {})
    yield artifact
    artifact.close()


def run(
    writers: ModuleType, artifact: Artifact, workers: int, *actions: str, stop_after: int = 99
) -> tuple[JobResult, list[Event]]:
    """Shards 0, 1, ... with these actions; a stop is requested once so many events came."""
    events: list[Event] = []
    stop = threading.Event()

    def report(event: Event) -> None:
        events.append(event)
        if len(events) >= stop_after:
            stop.set()

    tasks = [(str(number), action) for number, action in enumerate(actions)]
    where = TaskPlacement(workers)
    result = run_pool_job(tasks, writers.write, artifact, where, report, stop, shard_name=lambda task: task[0])
    return result, events


@pytest.mark.parametrize("workers", [0, 1])
def test_each_shard_is_reported_and_a_failing_one_quarantined(
    writers: ModuleType, artifact: Artifact, workers: int
) -> None:
    result, events = run(writers, artifact, workers, "one", "EIO", "two")
    one, first, second = writers.record("0"), writers.record("2-a"), writers.record("2-b")
    reason = "OSError: [Errno 5] Input/output error"
    assert events == [
        *(Pulse(rows=one.rows), ShardDone(one), ShardFailed("1", reason)),
        *(Pulse(rows=first.rows), ShardDone(first), Pulse(rows=second.rows), ShardDone(second)),
    ]
    assert result == JobResult({"1": reason}) and artifact.quarantined() == {"1": reason}
    assert Path(artifact.url, "tries.1").read_text() == "..."


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS"])
def test_a_disk_that_takes_nothing_more_ends_the_job(
    writers: ModuleType, artifact: Artifact, workers: int, name: str
) -> None:
    with pytest.raises(RunFailed, match="run the same command: it resumes where it was"):
        run(writers, artifact, workers, name, "one")
    assert Path(artifact.url, "tries.0").read_text() == "." and artifact.quarantined() == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_is_no_failure(writers: ModuleType, artifact: Artifact, workers: int) -> None:
    result, events = run(writers, artifact, workers, *["one"] * 9, stop_after=2)
    assert result == JobResult(interrupted=True) and len(events) == 2
