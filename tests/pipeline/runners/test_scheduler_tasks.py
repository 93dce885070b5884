"""The scheduler with tasks instead of shards, and with a pool that is lost; scripted workers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capipe.errors import DamagedShard
from capipe.manifests.artifact import Artifact
from capipe.manifests.manifest import ShardRecord
from capipe.manifests.schema import INGEST
from capipe.manifests.shards import InputShard
from capipe.pipeline.runners.messages import (
    Assignment,
    Event,
    Ready,
    ShardDone,
    ShardFailed,
    ShardTask,
    TaskDone,
    Want,
    WorkerFailed,
)
from capipe.pipeline.runners.scheduler import AHEAD, PoolLost, Scheduler
from capipe.pipeline.runners.shard_queue import JobResult
from capipe.pipeline.runners.task_worker import TaskJob

from .test_scheduler import Answer, ScriptedHandle, ScriptedPool, done, record, run, shards

_NUMBERS = itertools.count()


@pytest.fixture
def artifact(tmp_path: Path) -> Iterator[Artifact]:
    made = Artifact.create(str(tmp_path / "out"), "test", {}, {})
    yield made
    made.close()


def task(number: int, work: str = "do") -> ShardTask:
    name = f"{number:05d}"
    return ShardTask(name, (f"{name}-a", f"{name}-b"), work)


def finished(assignment: Assignment[ShardTask]) -> list[Event | None]:
    return [TaskDone(assignment.shard.name, [record(name) for name in assignment.shard.shards]), Want()]


class TaskHandle(ScriptedHandle):
    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.said.appendleft(Ready(None))


def test_tasks_are_read_as_workers_are_free_and_all_their_shards_reported(artifact: Artifact) -> None:
    read: list[int] = []
    most = 0

    def tasks() -> Iterator[ShardTask]:
        for number in range(3 * AHEAD):
            read.append(number)
            yield task(number)

    def answer(assignment: Assignment[ShardTask]) -> list[Event | None]:
        nonlocal most
        given.append(assignment.shard.name)
        most = max(most, len(read) - len(given))
        return finished(assignment)

    given: list[str] = []
    events: list[Event] = []
    pool = ScriptedPool(2 * AHEAD, lambda: TaskHandle(answer))
    assert Scheduler(pool, artifact, events.append).run(tasks()) == JobResult()
    assert done(events) == sorted(name for number in range(3 * AHEAD) for name in task(number).shards)
    assert most <= AHEAD and len(pool.workers) > AHEAD  # a worker for each task read, and more once these are given


def test_a_task_whose_worker_died_is_done_with_care_at_once(artifact: Artifact) -> None:
    """Its worker was ready, so it is the task's fault and not the place's: no pause."""
    given: list[str] = []

    def answer(assignment: Assignment[ShardTask]) -> list[Event | None]:
        given.append(assignment.shard.work)
        return [None] if assignment.shard.work == "do" else finished(assignment)

    pool, events = ScriptedPool(1, lambda: TaskHandle(answer)), list[Event]()
    result = Scheduler(pool, artifact, events.append).run(
        iter([task(0)]), lambda unit: ShardTask(unit.name, unit.shards, "carefully")
    )
    assert result == JobResult() and given == ["do", "carefully"] and pool.slots == [0, 0]
    assert [event.reason for event in events if isinstance(event, WorkerFailed)] == [
        "the worker process died (exit code -9)"
    ]


def test_a_task_whose_input_is_damaged_is_quarantined_at_once(artifact: Artifact) -> None:
    given: list[str] = []

    def answer(assignment: Assignment[ShardTask]) -> list[Event | None]:
        name = assignment.shard.name
        given.append(name)
        if name == "00000":
            return [ShardFailed(name, "its bytes are others", final=True), Want()]
        return finished(assignment)

    pool = ScriptedPool(1, lambda: TaskHandle(answer))
    result = Scheduler(pool, artifact, lambda event: None).run(iter([task(0), task(1)]))
    assert given == ["00000", "00001"] and result.quarantined == {"00000": "its bytes are others"}


def test_a_worker_reports_a_damaged_input_and_goes_on(artifact: Artifact) -> None:
    class Channel:
        def __init__(self) -> None:
            self.stopping, self.sent = asyncio.Event(), list[Event]()
            self.tasks = [Assignment(task(0)), Assignment(task(1)), None]

        async def next_shard(self) -> Assignment[ShardTask] | None:
            return self.tasks.pop(0)

        def send(self, event: Event) -> None:
            self.sent.append(event)

    channel = Channel()
    assert asyncio.run(TaskJob(_damaged).work(artifact, channel)) is None
    assert [event for event in channel.sent if isinstance(event, ShardFailed)] == [
        ShardFailed("00000", "00000: torn", final=True),
        ShardFailed("00001", "00001: torn", final=True),
    ]


def _damaged(work: str, *, artifact: Artifact) -> ShardRecord:
    raise DamagedShard(f"{next(_NUMBERS):05d}: torn")


class LostPool(ScriptedPool):
    """Out of reach after so many events."""

    def __init__(self, size: int, events: int, *handles: Callable[[], ScriptedHandle]) -> None:
        super().__init__(size, *handles)
        self.left = events

    def listen(self, seconds: float) -> Iterator[tuple[ScriptedHandle, Event | None]]:
        for pair in super().listen(seconds):
            if not self.left:
                raise PoolLost("the head is gone")
            self.left -= 1
            yield pair


def commits(artifact: Artifact, assignment: Assignment[InputShard]) -> list[Event | None]:
    with artifact.begin(assignment.shard.name, INGEST, claim=assignment.claim) as shard:
        shard.commit(rows_in=0, input_info={"digest": "d"})
    return [ShardDone(artifact.committed()[assignment.shard.name]), Want()]


def test_a_lost_pool_ends_a_run_that_is_not_done(artifact: Artifact) -> None:
    artifact.fence()
    pool = LostPool(1, 3, lambda: ScriptedHandle(lambda assignment: commits(artifact, assignment)))
    events: list[Event] = []
    with pytest.raises(PoolLost, match="the head is gone"):
        Scheduler(pool, artifact, events.append).run(shards(3))
    assert done(events) == ["00000", "00001"]  # the second was committed, which nobody had reported
    assert not list(Path(artifact.url, "_capipe/claims").iterdir())


def test_a_lost_pool_does_not_matter_once_all_is_committed(artifact: Artifact) -> None:
    artifact.fence()
    pool = LostPool(1, 3, lambda: ScriptedHandle(lambda assignment: commits(artifact, assignment)))
    outcome, events = run(pool, artifact, 2)
    assert outcome == JobResult() and done(events) == ["00000", "00001"]
    assert not list(Path(artifact.url, "_capipe/claims").iterdir())
