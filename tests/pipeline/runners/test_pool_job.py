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
from capipe.manifests.sharing.claims import Claim
from capipe.pipeline.runners import shard_queue
from capipe.pipeline.runners.messages import DoneElsewhere, Event, Pulse, ShardDone, ShardFailed, ShardLost
from capipe.pipeline.runners.placement import TaskPlacement
from capipe.pipeline.runners.pool_job import run_pool_job
from capipe.pipeline.runners.shard_queue import JobResult

# Runs in the workers. Tasks are (shard, what to do).
WRITERS = """
    import errno, os
    from capipe.manifests.manifest import ShardRecord
    from capipe.manifests.schema import INGEST

    def record(shard):
        return ShardRecord(shard, {"ok": len(shard)}, {}, {"digest": "d"}, "f")

    def write(task, artifact):
        shard, action = task
        if action == "commit":
            with artifact.begin(shard, INGEST) as out:
                return out.commit(rows_in=0, input_info={"digest": "d"})
        if action == "lose":  # another run takes it for dead, and the task over
            with artifact.begin(shard, INGEST) as out:
                os.unlink(os.path.join(artifact.url, "_capipe/claims", f"{shard}.json"))
                return out.commit(rows_in=0, input_info={"digest": "d"})
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


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Artifact]:
    artifact = Artifact.create(str(tmp_path / "shared"), "test", {}, {}, share=True)
    yield artifact
    artifact.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_tasks_of_another_run_are_waited_for(
    writers: ModuleType, shared: Artifact, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that it commits is not done again; one that it leaves is."""
    monkeypatch.setattr(shard_queue, "LOOK_SECONDS", 0.1)
    other = Artifact.create(shared.url, "test", {}, {}, share=True)
    assert other.claims is not None
    tokens = {shard: other.claims.take(shard) for shard in "01"}

    def end_of_the_other() -> None:
        writers.write(("0", "commit"), other.under(Claim("0", tokens["0"])))
        other.close()

    timer = threading.Timer(0.5, end_of_the_other)
    timer.start()
    result, events = run(writers, shared, workers, *["commit"] * 3)
    timer.join()
    assert result == JobResult() and sorted(shared.committed()) == ["0", "1", "2"]
    assert [event.record.shard for event in events if isinstance(event, DoneElsewhere)] == ["0"]
    assert sorted(event.record.shard for event in events if isinstance(event, ShardDone)) == ["1", "2"]
    assert Path(shared.url, "_capipe/manifest.jsonl").read_text().count("\n") == 3


def test_a_task_that_was_taken_over_is_no_failure(
    writers: ModuleType, shared: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_queue, "LOOK_SECONDS", 0.1)
    stop = threading.Event()
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        stop.set()

    where, tasks = TaskPlacement(0), [("0", "lose")]
    result = run_pool_job(tasks, writers.write, shared, where, report, stop, shard_name=lambda task: task[0])
    assert events == [ShardLost("0")] and result.quarantined == {} and shared.committed() == {}


def test_a_replacement_is_made_in_a_shared_folder_too(writers: ModuleType, shared: Artifact) -> None:
    """The version that stands there is the old one, and not what another run just made."""
    run(writers, shared, 0, "commit")
    result, events = run(writers, shared, 0, "one")
    assert result == JobResult() and [type(event) for event in events] == [Pulse, ShardDone]
