"""The scheduler with scripted workers: no process, no model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capipe.errors import CapipeError, RunFailed
from capipe.manifests.artifact import Artifact
from capipe.manifests.manifest import ShardRecord
from capipe.manifests.schema import INGEST
from capipe.manifests.shards import InputShard
from capipe.pipeline.runners import inline, shard_queue, worker_slots
from capipe.pipeline.runners.inline import DirectChannel
from capipe.pipeline.runners.messages import (
    Assignment,
    DoneElsewhere,
    Event,
    Note,
    Pulse,
    ShardDone,
    ShardFailed,
    ShardLost,
    Want,
    WorkerFailed,
)
from capipe.pipeline.runners.scheduler import Order, Scheduler
from capipe.pipeline.runners.shard_queue import JobResult

Answer = Callable[[Assignment], list[Event | None]]


def record(name: str) -> ShardRecord:
    return ShardRecord(name, {"ok": 1}, {}, {"digest": "d"}, "f")


def well(assignment: Assignment) -> list[Event | None]:
    return [Pulse({"ok": 1}), ShardDone(record(assignment.shard.name)), Want()]


class ScriptedHandle:
    """Answers each shard as its script says; wants a first one at once unless it never gets a machine."""

    def __init__(self, answer: Answer, started: bool = True) -> None:
        self.answer, self.started, self.name = answer, started, "this machine"
        self.said: deque[Event | None] = deque([Want()] if started else [])
        self.orders: list[Order] = []
        self.dismissed = self.killed = False

    def send(self, order: Order) -> None:
        if order == "wait":
            return
        self.orders.append(order)
        self.said.extend(self.answer(order) if isinstance(order, Assignment) else [None])

    def end(self) -> str | None:
        clean = self.orders and not isinstance(self.orders[-1], Assignment)
        return None if clean else "the worker process died (exit code -9)"

    def dismiss(self) -> None:
        self.dismissed = True

    def kill(self) -> None:
        self.killed = True


class ScriptedPool:
    """Starts workers with the scripts in turn, the last one again and again."""

    def __init__(self, size: int, *handles: Callable[[], ScriptedHandle]) -> None:
        self.size, self._handles, self.workers = size, list(handles), list[ScriptedHandle]()
        self.slots = list[int]()

    def start(self, slot: int) -> ScriptedHandle:
        self.slots.append(slot)
        self.workers.append(self._handles[min(len(self.workers), len(self._handles) - 1)]())
        return self.workers[-1]

    def listen(self, seconds: float) -> Iterator[tuple[ScriptedHandle, Event | None]]:
        for handle in list(self.workers):
            if handle.said:
                yield handle, handle.said.popleft()

    def close(self) -> None: ...


def good() -> ScriptedHandle:
    return ScriptedHandle(well)


def shards(count: int) -> list[InputShard]:
    return [InputShard(f"{number:05d}", f"/in/{number:05d}.tar") for number in range(count)]


def run(pool: ScriptedPool, artifact: Artifact, count: int) -> tuple[JobResult, list[Event]]:
    events: list[Event] = []
    return Scheduler(pool, artifact, events.append).run(shards(count)), events


@pytest.fixture
def artifact(tmp_path: Path) -> Iterator[Artifact]:
    made = Artifact.create(str(tmp_path / "out"), "test", {}, {})
    yield made
    made.close()


def done(events: list[Event]) -> list[str]:
    return sorted(event.record.shard for event in events if isinstance(event, ShardDone))


def test_every_shard_goes_to_one_worker(artifact: Artifact) -> None:
    pool = ScriptedPool(3, good)
    outcome, events = run(pool, artifact, 10)
    assert outcome == JobResult() and done(events) == [shard.name for shard in shards(10)]
    assert len(pool.workers) == 3 and all(handle.orders[-1] is None for handle in pool.workers)
    given = [order.shard.name for handle in pool.workers for order in handle.orders if isinstance(order, Assignment)]
    assert sorted(given) == [shard.name for shard in shards(10)]


def test_a_dead_workers_shard_goes_to_its_successor(artifact: Artifact) -> None:
    pool = ScriptedPool(1, lambda: ScriptedHandle(lambda assignment: [Pulse({"ok": 1}), None]), good)
    outcome, events = run(pool, artifact, 3)
    assert outcome == JobResult() and len(done(events)) == 3 and len(pool.workers) == 2
    assert [event.reason for event in events if isinstance(event, WorkerFailed)] == [
        "the worker process died (exit code -9)"
    ]


def test_a_shard_that_was_committed_before_its_worker_died_is_done(artifact: Artifact) -> None:
    def commits_and_dies(assignment: Assignment) -> list[Event | None]:
        with artifact.begin(assignment.shard.name, INGEST) as shard:
            shard.commit(rows_in=0, input_info={"digest": "d"})
        return [None]

    pool = ScriptedPool(1, lambda: ScriptedHandle(commits_and_dies), good)
    outcome, events = run(pool, artifact, 2)
    assert outcome == JobResult() and done(events) == ["00000", "00001"]
    given = [order.shard.name for handle in pool.workers for order in handle.orders if isinstance(order, Assignment)]
    assert given == ["00000", "00001"]


def test_a_poison_shard_is_quarantined_whether_it_fails_or_kills(artifact: Artifact) -> None:
    def poisoned(assignment: Assignment) -> list[Event | None]:
        if assignment.shard.name == "00001":
            return [Pulse({"ok": 1}), None]
        if assignment.shard.name == "00002":
            return [ShardFailed("00002", "torn"), Want()]
        return well(assignment)

    pool = ScriptedPool(2, lambda: ScriptedHandle(poisoned))
    outcome, events = run(pool, artifact, 6)
    assert outcome.quarantined == {"00001": "the worker process died (exit code -9)", "00002": "torn"}
    assert artifact.quarantined() == outcome.quarantined
    assert done(events) == ["00000", "00003", "00004", "00005"]


def test_workers_that_die_before_any_row_end_the_run(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_slots, "PAUSES", (0.0, 0.0))
    pool = ScriptedPool(1, lambda: ScriptedHandle(lambda assignment: [None]))
    with pytest.raises(RunFailed, match="3 workers in a row on this machine ended before they finished a row"):
        run(pool, artifact, 9)
    assert len(pool.workers) == 3


def busy() -> ScriptedHandle:
    """A worker that finds no room on its device."""
    handle = ScriptedHandle(well)
    handle.said = deque([WorkerFailed("no memory", 3, final=False)])
    handle.name = "GPU 0"
    return handle


def test_a_slot_that_never_starts_is_given_up_and_the_others_go_on(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_slots, "PAUSES", (0.0, 0.0))
    pool = ScriptedPool(2, busy, lambda: ScriptedHandle(well, started=False), busy, busy)
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, Note) and sum(isinstance(each, Note) for each in events) == 3:
            pool.workers[1].said.append(Want())  # the other one is up only now

    assert Scheduler(pool, artifact, report).run(shards(4)) == JobResult()
    told = [event.text for event in events if isinstance(event, Note)]
    assert len(done(events)) == 4 and len(pool.workers) == 4 and pool.slots == [0, 1, 0, 0]
    assert told[:2] == ["a worker on GPU 0 could not start: no memory; another one is tried there in 0 s"] * 2
    assert told[2].startswith("GPU 0 is given up, as 3 workers in a row ended there") and told[2].endswith("no memory")


def test_an_unused_slot_replaces_a_broken_one(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_slots, "PAUSES", (0.0,))
    pool = ScriptedPool(3, busy, busy, good)
    outcome, events = run(pool, artifact, 1)
    assert outcome == JobResult() and done(events) == ["00000"] and pool.slots == [0, 0, 1]


def test_the_run_ends_with_its_last_slot(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_slots, "PAUSES", (0.0,))
    pool = ScriptedPool(2, busy)
    with pytest.raises(RunFailed, match=r"no memory; 2 workers in a row on GPU 0 .* the last place that was left"):
        run(pool, artifact, 5)
    assert sorted(pool.slots) == [0, 0, 1, 1]


def test_finished_rows_reset_the_failures_of_a_slot(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker dies now and then, but never before it did something: that costs no slot."""
    monkeypatch.setattr(worker_slots, "PAUSES", (0.0,))
    tried = set[str]()

    def dies(assignment: Assignment) -> list[Event | None]:
        name = assignment.shard.name
        again, _ = name in tried or not int(name) % 2, tried.add(name)
        return well(assignment) if again else [Pulse({"ok": 1}), None]

    outcome, events = run(ScriptedPool(1, busy, lambda: ScriptedHandle(dies)), artifact, 6)
    assert outcome == JobResult() and len(done(events)) == 6


def test_a_failure_that_no_other_worker_would_be_spared_ends_the_run(artifact: Artifact) -> None:
    pool = ScriptedPool(2, lambda: ScriptedHandle(lambda assignment: [WorkerFailed("no such model", 2, final=True)]))
    with pytest.raises(CapipeError, match="no such model") as raised:
        run(pool, artifact, 9)
    assert raised.value.exit_code == 2 and all(handle.dismissed and handle.killed for handle in pool.workers)


def test_a_worker_that_never_gets_a_machine_is_not_waited_for(artifact: Artifact) -> None:
    pool = ScriptedPool(2, good, lambda: ScriptedHandle(well, started=False))
    outcome, events = run(pool, artifact, 4)
    assert outcome == JobResult() and len(done(events)) == 4
    assert pool.workers[1].killed and pool.workers[1].orders == []


def test_draining_hands_out_nothing_more(artifact: Artifact) -> None:
    pool = ScriptedPool(1, good)
    scheduler = Scheduler(pool, artifact, lambda event: isinstance(event, ShardDone) and scheduler._stop.set())
    assert scheduler.run(shards(5)).interrupted
    assert "stop" in pool.workers[0].orders and len(pool.workers[0].orders) <= 4


def test_two_runs_share_and_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run has a shard in work, commits another, and gives up a third; the other run sees all that."""
    monkeypatch.setattr(shard_queue, "LOOK_SECONDS", 0.0)
    ours = Artifact.create(str(tmp_path / "out"), "test", {}, {}, share=True)
    theirs = Artifact.create(str(tmp_path / "out"), "test", {}, {}, share=True)
    assert theirs.claims is not None
    tokens = {name: theirs.claims.take(name) for name in ("00000", "00001", "00002")}

    def go_on(event: Event) -> None:
        """What the other run does once it is waited for."""
        events.append(event)
        if isinstance(event, Note):
            assert f"waiting for 3 shards that others work on: {theirs.claims.owner}" in event.text  # type: ignore[union-attr]
            with theirs.begin("00000", INGEST, claim=tokens["00000"]) as shard:
                shard.commit(rows_in=0, input_info={"digest": "d"})
            theirs.quarantine("00001", "broken there")
            theirs.close()  # and 00002 is free again

    events: list[Event] = []
    outcome = Scheduler(ScriptedPool(1, good), ours, go_on).run(shards(5))
    assert done(events) == ["00002", "00003", "00004"] and outcome.quarantined == {"00001": "broken there"}
    assert [event.record.shard for event in events if isinstance(event, DoneElsewhere)] == ["00000"]
    ours.close()
    assert not (tmp_path / "out/_capipe/claims").exists()


def test_a_shard_that_was_taken_from_us_is_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_queue, "LOOK_SECONDS", 0.0)
    ours = Artifact.create(str(tmp_path / "out"), "test", {}, {}, share=True)
    tries: list[str | None] = []

    def answer(assignment: Assignment) -> list[Event | None]:
        tries.append(assignment.claim)
        return [ShardLost("00000"), Want()] if len(tries) == 1 else well(assignment)

    outcome, events = run(ScriptedPool(1, lambda: ScriptedHandle(answer)), ours, 1)
    assert outcome == JobResult() and done(events) == ["00000"] and len({*tries}) == 2
    ours.close()


async def test_a_worker_in_this_process_waits_for_others_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_queue, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(inline, "POLL_SECONDS", 0.01)
    ours = Artifact.create(str(tmp_path / "out"), "test", {}, {}, share=True)
    theirs = Artifact.create(str(tmp_path / "out"), "test", {}, {}, share=True)
    assert theirs.claims is not None and theirs.claims.take("00000") is not None
    channel = DirectChannel(shards(2), ours, lambda event: None)
    first = await channel.next_shard()
    assert isinstance(first, Assignment) and first.shard.name == "00001"
    channel.send(ShardDone(record("00001")))
    assert await channel.next_shard() == "wait"
    waiting = asyncio.create_task(channel.next_shard())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    theirs.close()
    second = await waiting
    assert isinstance(second, Assignment) and second.shard.name == "00000" and second.claim is not None
    channel.send(ShardDone(record("00000")))
    assert await channel.next_shard() is None and channel.queue.empty
    ours.close()
