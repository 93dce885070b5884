"""The circuit breaker: an engine that refuses everything ends a run, and what it refused is done by the next one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import RunFailed
from capipe.manifests.artifact import Artifact
from capipe.manifests.manifest import ShardRecord
from capipe.manifests.shards import Row, expand, join
from capipe.manifests.status import Status
from capipe.models.engines.base import GenerationRequest, ImageInput, Prompt, Refused, Rejected, RequestError
from capipe.models.engines.loading import EngineConfig
from capipe.models.images.formats import ImageProblem
from capipe.pipeline.jobs.annotate import AnnotateProcessor, AnnotateStage
from capipe.pipeline.jobs.rows.counting_engine import CountingEngine
from capipe.pipeline.jobs.rows.engine import EngineSetup, LoadedEngine
from capipe.pipeline.runners import circuit_breaker, worker
from capipe.pipeline.runners.circuit_breaker import ErrorStreak, Refusals, general_reason
from capipe.pipeline.runners.inline import run_inline
from capipe.pipeline.runners.messages import Event, Pulse
from capipe.pipeline.runners.shard_run import ShardRun
from capipe.stages.annotate.captioner import AnnotateConfig
from capipe.stages.annotate.prompts import NamedPrompt

from ...conftest import photo, tar_bytes
from ...scripted import Scripted
from ..conftest import CaptionServer, capipe, one_line, table

SHARD = 30
CONFIG = AnnotateConfig(prompts=(NamedPrompt("p", "Describe."),), max_attempts=1)
Answer = Callable[[int], str | Exception]


class Numbered(LoadedEngine):
    """An engine asked about images by their number, one after the other; a "corrupt" one is not asked about."""

    def __init__(self, answer: Answer, corrupt: Callable[[int], bool]) -> None:
        self.asked: list[int] = []

        def generate(request: GenerationRequest) -> str | Exception:
            assert request.prompt.image is not None and request.prompt.image.encoded is not None
            self.asked.append(int(request.prompt.image.encoded))
            return answer(self.asked[-1])

        engine = Scripted(generate=generate)
        engine.concurrency = 1
        super().__init__(engine, None)
        self._corrupt = corrupt

    async def image(self, row: Row) -> ImageInput | ImageProblem:
        assert row.uid is not None
        if self._corrupt(int(row.key)):
            return ImageProblem(Status.CORRUPT, "torn")
        return ImageInput(row.uid, encoded=row.key.encode())


class Windowed(AnnotateProcessor):
    """With a window of so many rows, whatever its engine takes."""

    def __init__(self, stage: AnnotateStage, engine: Numbered, window: int) -> None:
        super().__init__(stage, engine)
        self._rows = window

    @property
    def window(self) -> int:
        return self._rows


@dataclass
class Captions:
    """`annotate` with an engine to order; ``engine`` is the last one that was loaded."""

    answer: Answer
    corrupt: Callable[[int], bool] = lambda number: False
    window: int = 2
    name: str = "annotate"
    engine: Numbered | None = field(default=None)

    async def load(self) -> AnnotateProcessor:
        self.engine = Numbered(self.answer, self.corrupt)
        setup = EngineSetup(EngineConfig("auto", "m"))
        return Windowed(AnnotateStage(CONFIG, setup, "m"), self.engine, self.window)


def well(number: int) -> str:
    return f"caption of {number}"


def refuse(number: int) -> Exception:
    return RequestError(f"request {number:08x} got HTTP 503 after {number * 7} ms")


@pytest.fixture
def shards(tmp_path: Path) -> Callable[[int], Path]:
    def make(rows: int, size: int = SHARD) -> Path:
        folder = tmp_path / "in"
        folder.mkdir()
        image = photo(0)  # one for all: rows are told apart by their keys
        for number, start in enumerate(range(0, rows, size)):
            members = {f"{row:06}.jpg": image for row in range(start, min(start + size, rows))}
            (folder / f"{number:05}.tar").write_bytes(tar_bytes(members))
        return folder

    return make


def run(shards: Path, out: Path, stage: Captions) -> list[Event]:
    artifact = Artifact.create(str(out), "annotate", {}, {})
    events: list[Event] = []
    try:
        todo = [shard for shard in expand(str(shards)) if shard.name not in artifact.committed()]
        run_inline(stage, artifact, events.append, todo)
    finally:
        artifact.close()
    return events


def same(out: Path, alone: Path) -> bool:
    names = sorted(path.name for path in alone.glob("*.parquet"))
    assert sorted(path.name for path in out.glob("*.parquet")) == names
    return all((out / name).read_bytes() == (alone / name).read_bytes() for name in names)


def test_an_engine_that_refuses_everything(shards: Callable[[int], Path], tmp_path: Path) -> None:
    """It ends after 200 rows, records none of them, and the same command then does all."""
    folder, out, alone = shards(400), tmp_path / "out", tmp_path / "alone"
    stage = Captions(refuse)
    with pytest.raises(
        RunFailed, match=r"200 rows in a row ended in engine_error for one reason: p: request"
    ) as raised:
        run(folder, out, stage)
    assert stage.engine is not None and len(stage.engine.asked) in range(200, 203)
    assert raised.value.exit_code == 3 and "\n" not in str(raised.value)
    assert Artifact.open(str(out)).committed() == {} and not list(out.glob("*.parquet"))
    run(folder, out, Captions(well))
    run(folder, alone, Captions(well))
    assert same(out, alone) and len(table(out)) == 400


def test_one_that_refuses_for_good(shards: Callable[[int], Path], tmp_path: Path) -> None:
    folder = shards(120)
    stage = Captions(lambda number: RequestError(f"HTTP 401: no such key ({number})", final=True))
    with pytest.raises(RunFailed, match="the engine refused 50 requests in a row for good: HTTP 401: no such key"):
        run(folder, tmp_path / "out", stage)
    assert stage.engine is not None and len(stage.engine.asked) in range(50, 53)
    assert Artifact.open(str(tmp_path / "out")).committed() == {}


def test_it_ends_at_any_time_and_keeps_what_was_good(shards: Callable[[int], Path], tmp_path: Path) -> None:
    """The shard in which the streak begins is done again, but its good rows are in its journal."""
    folder, out, alone = shards(400), tmp_path / "out", tmp_path / "alone"
    with pytest.raises(RunFailed, match="200 rows in a row"):
        run(folder, out, Captions(lambda number: well(number) if number < 100 else refuse(number)))
    assert sorted(Artifact.open(str(out)).committed()) == ["00000", "00001", "00002"]
    again = Captions(well)
    run(folder, out, again)
    run(folder, alone, Captions(well))
    assert again.engine is not None and sorted(again.engine.asked) == list(range(100, 400))
    assert same(out, alone)


def test_a_commit_that_is_under_way_ends_before_the_run_does(
    shards: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in a thread: one left behind would write into an artifact that is closed, and that another may hold."""
    folder, out, commit = shards(400), tmp_path / "out", ShardRun.commit

    def slow(run: ShardRun, *arguments: Any) -> ShardRecord:
        time.sleep(0.5)  # the 200 rows of the streak are refused meanwhile
        return commit(run, *arguments)

    monkeypatch.setattr(ShardRun, "commit", slow)
    with pytest.raises(RunFailed, match="200 rows in a row"):
        run(folder, out, Captions(lambda number: well(number) if number < 100 else refuse(number)))
    committed = sorted(Artifact.open(str(out)).committed())
    assert committed == ["00000", "00001", "00002"]
    time.sleep(1)
    assert sorted(Artifact.open(str(out)).committed()) == committed


def test_a_streak_that_a_good_row_breaks_is_recorded(shards: Callable[[int], Path], tmp_path: Path) -> None:
    folder, out = shards(400), tmp_path / "out"
    events = run(folder, out, Captions(lambda number: refuse(number) if 40 <= number < 190 else well(number)))
    rows = table(out)
    assert [row["status"] for row in rows] == ["ok"] * 40 + ["engine_error"] * 150 + ["ok"] * 210
    assert sum(event.rows.get("engine_error", 0) for event in events if isinstance(event, Pulse)) == 150


def test_a_shard_that_waits_leaves_room_for_the_next(shards: Callable[..., Path], tmp_path: Path) -> None:
    """Whichever of its rows is finished last: here each shard's last one is torn."""
    folder = shards(90, 3)
    run(folder, tmp_path / "out", Captions(refuse, corrupt=lambda number: number % 3 == 2, window=1))
    assert [row["status"] for row in table(tmp_path / "out")] == ["engine_error", "engine_error", "corrupt"] * 30


def test_rows_that_no_engine_saw_do_not_break_it(shards: Callable[[int], Path], tmp_path: Path) -> None:
    folder = shards(600)
    with pytest.raises(RunFailed, match="200 rows in a row"):
        run(folder, tmp_path / "out", Captions(refuse, corrupt=lambda number: number % 2 == 0))


def test_reasons_that_differ_are_no_streak(shards: Callable[[int], Path], tmp_path: Path) -> None:
    folder = shards(450)
    reasons = ("timed out", "connection reset")
    run(folder, tmp_path / "out", Captions(lambda number: RequestError(reasons[number // 150 % 2])))
    assert {row["status"] for row in table(tmp_path / "out")} == {"engine_error"}


def test_few_rows_that_all_fail_are_recorded_at_the_end(shards: Callable[..., Path], tmp_path: Path) -> None:
    """And shards of one row each do not lock the feeder out, which has room for few open ones."""
    folder = shards(150, 1)
    run(folder, tmp_path / "out", Captions(refuse, window=1))
    assert [row["status"] for row in table(tmp_path / "out")] == ["engine_error"] * 150


def test_a_stage_is_not_ended_by_errors_of_the_one_before(
    shards: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that it passes on as they are say nothing of its own engine."""
    folder, before = shards(250), tmp_path / "before"
    monkeypatch.setattr(circuit_breaker, "MOST_FAILED_ROWS", 1000)
    run(folder, before, Captions(lambda number: refuse(number) if number < 240 else well(number)))
    monkeypatch.undo()

    class Passing(Captions):
        async def load(self) -> AnnotateProcessor:
            made = await super().load()

            async def process_row(row: Row) -> dict[str, Any]:
                beside = row.beside["captions"]
                return {**made.passed_on(row), "status": beside["status"], "error": beside["error"]}

            made.process_row = process_row  # type: ignore[method-assign]
            return made

    artifact = Artifact.create(str(tmp_path / "out"), "annotate", {}, {})
    todo = join(expand(str(folder)), {"captions": Artifact.open(str(before))})
    run_inline(Passing(well), artifact, lambda event: None, todo)
    artifact.close()
    assert [row["status"] for row in table(tmp_path / "out")] == ["engine_error"] * 240 + ["ok"] * 10


def test_what_waits_is_bounded(shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of unreadable rows with one failed row each: after so many rows they are recorded."""
    monkeypatch.setattr(worker, "HELD_ROWS", 30)
    folder, most = shards(120, 6), 0

    class Watching(Captions):
        async def load(self) -> AnnotateProcessor:
            made = await super().load()
            watched = made.process_row

            async def process_row(row: Row) -> dict[str, Any]:
                nonlocal most
                done = len(Artifact.open(str(tmp_path / "out")).committed())
                most = max(most, int(row.key) // 6 - done)
                return await watched(row)

            made.process_row = process_row  # type: ignore[method-assign]
            return made

    run(folder, tmp_path / "out", Watching(refuse, corrupt=lambda number: number % 6 > 0))
    assert most <= 30 // 6 + worker.OPEN_SHARDS + 2
    assert len(table(tmp_path / "out")) == 120


def test_reasons_without_ids_and_numbers() -> None:
    one = general_reason("img-17: request req_a81f0c failed: HTTP 429 at 0x7f3a (a_cat)", ("a_cat", "9f" * 16))
    two = general_reason("img-902: request req_00dd21 failed: HTTP 503 at 0x1 (the dog)", ("the dog", "17" * 16))
    assert one == two == "#: request # failed: HTTP # at # (#)"
    assert general_reason("timed out") != general_reason("connection reset")
    assert general_reason("a cat sat", ("a",)) == "# cat sat"  # a name is a word, not every letter of it


def test_shards_wait_for_the_end_of_their_streak_alone() -> None:
    streak = ErrorStreak[str]()
    assert streak.failed("one", "slow 1", ()) == set() and streak.failed("two", "slow 2", ()) == set()
    assert streak.shards == {"one", "two"}
    assert streak.failed("two", "gone", ()) == {"one"} and streak.shards == {"two"}  # two has rows of the new one, too
    assert streak.over() == {"two"} and streak.shards == set()


def test_refusals_count_until_an_answer() -> None:
    refusals, no, busy = Refusals(), RequestError("no", final=True), RequestError("busy")
    for _ in range(2):
        for _ in range(49):
            refusals.failed(no)
            refusals.failed(busy)
        refusals.over()
    for _ in range(49):
        refusals.failed(no)
    refusals.failed(busy)
    with pytest.raises(RunFailed, match="50 requests in a row"):
        refusals.failed(no)


def test_rejections_count_by_what_they_are_about_and_for_one_reason() -> None:
    """All questions about one image may be rejected for what it is: that says nothing of the others."""
    refusals = Refusals()
    for number in range(200):
        refusals.failed(Rejected(f"HTTP 400: {number} tokens are too many"), "one image")
    for number in range(40):
        refusals.failed(Rejected(f"HTTP 400: {number} tokens are too many"), f"image {number}")
    refusals.failed(Rejected("HTTP 400: no image"), "another")
    for number in range(49):
        refusals.failed(Rejected(f"HTTP 400: {number} tokens are too many"), f"image {number}")
    refusals.failed(RequestError("busy"), "image 50")
    with pytest.raises(RunFailed, match="about 50 images or texts in a row: HTTP 400: 7 tokens are too many"):
        refusals.failed(Rejected("HTTP 400: 7 tokens are too many"), "image 51")


async def test_a_refusal_is_an_answer() -> None:
    """One of a filter shows that the key and the request are good."""
    answers: list[Exception] = [RequestError("no", final=True)] * 40 + [Refused("filtered")]
    scripted = Scripted(generate=lambda request: answers[(len(scripted.generations) - 1) % len(answers)])
    engine = CountingEngine(scripted)
    for _ in range(120):
        with pytest.raises(RequestError):
            await engine.generate(GenerationRequest(Prompt("Describe.")))


def test_an_idle_worker_records_what_it_holds_back(shards: Callable[[int], Path], tmp_path: Path) -> None:
    """Where others have the rest of the shards, they might wait for ours: a run that shares a folder ends."""
    folder = shards(60)
    ours = Artifact.create(str(tmp_path / "out"), "annotate", {}, {}, share=True)
    theirs = Artifact.create(str(tmp_path / "out"), "annotate", {}, {}, share=True)
    assert theirs.claims is not None and theirs.claims.take("00001") is not None

    def report(event: Event) -> None:
        if "00000" in ours.committed():
            theirs.close()  # only now: whoever held its errors back until the end would never come to it

    run_inline(Captions(refuse), ours, report, expand(str(folder)))
    ours.close()
    assert len(table(tmp_path / "out")) == 60


def test_a_command_ends_in_one_line_and_does_the_same_rows_later(
    shards: Callable[[int], Path], tmp_path: Path, server: CaptionServer
) -> None:
    folder, out, alone = shards(210), tmp_path / "out", tmp_path / "alone"
    command = ["annotate", "--shards", folder, "--model", "m", "--engine", server.url, "--concurrency", 4]
    server.fails = lambda number, image: 404
    line = one_line(capipe(*command, "--out", out, code=3))
    assert " in a row " in line and "HTTP 404" in line and "run the same command to have them done" in line
    assert list(out.glob("*.parquet")) == []
    server.fails = lambda number, image: 200
    capipe(*command, "--out", out)
    capipe(*command, "--out", alone)
    assert same(out, alone) and len(table(out)) == 210
