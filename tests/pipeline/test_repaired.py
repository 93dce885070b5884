"""What was built on shards whose rows were tried again: these alone are done again, and rows keep what they have."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import BASE, SCORE
from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.pipeline.commands.filter import select_step
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.jobs.dedup import hash_images, mark, plan_dedup
from capipe.pipeline.jobs.rows.engine import execute, plan
from capipe.pipeline.runners.placement import Placement
from capipe.stages.dedup.marks import DedupConfig
from capipe.stages.filter.marked import MARKS
from capipe.stages.filter.select import SelectConfig

from ..conftest import photo
from ..stages.exporting import export
from ..stages.ingesting import ingest, rows
from ..stages.scored import write_scores

DRAWS: Iterator[int] = itertools.count()  # no draw comes twice, so a row that was done again shows


@dataclass(frozen=True)
class Drawing:
    """A stage that gives each image a number that was never given before.

    ``fails``: uids of which it makes errors; ``heeds``: rows that are not ok beside get none, as where captions are
    scored.
    """

    chunk: int = 1
    fails: frozenset[tuple[str, str]] = field(default=frozenset())
    name: str = "drawing"
    heeds: bool = False
    setup: None = None

    def semantic(self) -> dict[str, Any]:
        return {}

    async def load(self) -> DrawingProcessor:
        return DrawingProcessor(self)


class DrawingProcessor:
    schema = pa.schema([*BASE, pa.field("draw", pa.int64()), pa.field("beside", pa.int64())])
    writes_tar, window = False, 8

    def __init__(self, stage: Drawing) -> None:
        self.chunk, self._fails, self._heeds = stage.chunk, dict(stage.fails), stage.heeds

    async def process(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        out = [{**self.passed_on(row), "draw": next(DRAWS)} for row in rows]
        for row in out:
            if row["uid"] in self._fails:
                row |= {"status": self._fails[row["uid"]], "error": "once", "draw": None}
        for row, source in zip(out, rows, strict=True):
            for beside in source.beside.values():
                if self._heeds and beside["status"] != Status.OK:
                    row |= {"status": beside["status"], "error": beside["error"], "draw": None}
        return out

    def passed_on(self, row: Row) -> dict[str, Any]:
        beside = row.beside.get("first", {}).get("draw")
        return {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error, "beside": beside}

    def members(self, source: Row, row: dict[str, Any]) -> None:
        return None

    def gauges(self) -> dict[str, int]:
        return {}

    async def aclose(self) -> None:
        return None


def draw(
    shards: Path, out: Path, stage: Drawing | None = None, beside: Mapping[str, Path] | None = None, **options: Any
) -> list[str]:
    """Run the stage; returns the shards that it did."""
    artifacts = {name: Artifact.open(str(path)) for name, path in (beside or {}).items()}
    made = plan(stage or Drawing(), str(shards), str(out), beside=artifacts, **options)
    try:
        execute(made, lambda event: None, Placement())
    finally:
        made.artifact.close()
    assert verify(str(out)).faults == []
    return [shard.name for shard in made.todo]


def draws(out: Path) -> dict[str, int | None]:
    return {row["key"]: row["draw"] for row in rows(out)}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A table of nine pictures, of which 1 and 4 are not there yet; in shards of three."""
    (tmp_path / "share").mkdir()
    for number in {*range(9)} - {1, 4}:
        (tmp_path / f"share/{number}.jpg").write_bytes(photo(number))
    lines = (json.dumps({"path": f"share/{number}.jpg"}) + "\n" for number in range(9))
    (tmp_path / "list.jsonl").write_text("".join(lines))
    return tmp_path / "list.jsonl"


def mend(listed: Path, number: int) -> None:
    (listed.parent / f"share/{number}.jpg").write_bytes(photo(number))


@pytest.mark.parametrize("chunk", [1, 2])
def test_rows_of_the_same_image_keep_what_they_have(listed: Path, tmp_path: Path, chunk: int) -> None:
    shards, out, stage = tmp_path / "shards", tmp_path / "out", Drawing(chunk)
    ingest(listed, out=shards, shard_size=3)
    assert draw(shards, out, stage) == ["00000", "00001", "00002"]
    before, files = draws(out), {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    assert [key for key, number in before.items() if number is None] == ["000001", "000011"]
    assert draw(shards, out, stage) == []
    mend(listed, 4)
    ingest(listed, out=shards, shard_size=3)
    assert draw(shards, out, stage) == ["00001"]
    after = draws(out)
    assert after.pop("000011") is not None and before.pop("000011") is None
    assert after == before and (out / "00000.parquet").read_bytes() == files["00000.parquet"]
    mend(listed, 1)
    (listed.parent / "share/1.jpg").write_bytes(b"<html>")  # read at last, and no picture: the tar stays as it is
    ingest(listed, out=shards, shard_size=3)
    assert draw(shards, out, stage) == ["00000"]
    assert [row["status"] for row in rows(out)] == ["ok", "unsupported", *["ok"] * 7] and draws(out) == {
        **before,
        "000011": draws(out)["000011"],
    }


def test_a_shard_that_is_another_one_is_refused_as_ever(listed: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out"
    ingest(listed, out=shards, shard_size=3)
    draw(shards, out)
    mend(listed, 4)
    ingest(listed, out=shards, shard_size=3, fresh=True)
    with pytest.raises(ArtifactMismatch, match=r"00001\.tar: the shard changed since this output was made"):
        draw(shards, out)
    draw(shards, tmp_path / "shared", share=True)


def test_sharing_runs_take_nothing_back(listed: Path, tmp_path: Path) -> None:
    ingest(listed, out=tmp_path / "shards", shard_size=3)
    draw(tmp_path / "shards", tmp_path / "out")
    mend(listed, 4)
    ingest(listed, out=tmp_path / "shards", shard_size=3)
    with pytest.raises(BadInput, match="run the command once without --share"):
        draw(tmp_path / "shards", tmp_path / "out", share=True)


@pytest.mark.parametrize(("status", "retry"), [(Status.READ_ERROR, False), (Status.ENGINE_ERROR, True)])
def test_what_was_built_beside_follows(listed: Path, tmp_path: Path, status: Status, retry: bool) -> None:
    """A row that failed in one stage is done again there, and then in the stage whose rows lie beside."""
    shards, first, second = tmp_path / "shards", tmp_path / "first", tmp_path / "second"
    ingest(listed, out=shards, shard_size=3)
    uid = rows(shards)[5]["uid"]
    draw(shards, first, Drawing(fails=frozenset({(uid, str(status))})))
    draw(shards, second, Drawing(name="second"), {"first": first})
    before, other = draws(first), draws(second)
    assert draw(shards, first, retry=retry) == (["00000", "00001"] if retry else ["00001"])
    assert draws(first) == {**before, "000012": draws(first)["000012"]} and draws(first)["000012"] is not None
    assert draw(shards, second, Drawing(name="second"), {"first": first})[-1] == "00001"
    now = draws(second)
    assert now.pop("000012") != other.pop("000012") and now == other
    assert {row["key"]: row["beside"] for row in rows(second)} == draws(first)


def test_marks_follow(listed: Path, tmp_path: Path) -> None:
    shards, marks = tmp_path / "shards", tmp_path / "marks"
    ingest(listed, out=shards, shard_size=3)

    def dedup() -> list[str]:
        made = plan_dedup(str(shards), str(marks), DedupConfig(), workers=0)
        stop, told = threading.Event(), list[Any]()
        hashes, _ = hash_images(made, lambda event: None, stop)
        marked, _ = mark(made, hashes, None, told.append, stop)
        hashes.close()
        marked.close()
        assert verify(hashes.url).faults == verify(marked.url).faults == []
        return sorted({event.record.shard for event in told if hasattr(event, "record")})

    assert dedup() == ["00000", "00001", "00002"] and dedup() == []
    mend(listed, 1)
    (listed.parent / "share/4.jpg").write_bytes(photo(0))  # repeats a picture of another shard
    ingest(listed, out=shards, shard_size=3)
    (tmp_path / "share/9.jpg").write_bytes(photo(9))
    with listed.open("a") as file:
        file.write(json.dumps({"path": "share/9.jpg"}) + "\n")
    ingest(listed, out=shards, shard_size=3)
    assert dedup() == ["00000", "00001", "00002", "00003"] and dedup() == []
    found = {row["key"]: row for row in rows(marks / "marked")}
    assert len(found) == 10 and found["000011"]["duplicate_of"] == "000000"


def test_rows_that_marks_give_back_are_done_and_those_they_take_are_not_kept(listed: Path, tmp_path: Path) -> None:
    """Images that come later change groups, and with them which copy is left out; what reads the result follows."""
    shards, marks, out, second = (tmp_path / name for name in ("shards", "marks", "out", "second"))
    ingest(listed, out=shards, shard_size=3)

    def marked(*left_out: str) -> list[str]:
        artifact = Artifact.create(str(marks), "dedup", {}, {})
        for name in ("00000", "00001", "00002"):
            made = [row for row in rows(shards) if row["key"].startswith(name)]
            with artifact.begin(name, pa.schema(BASE), over=artifact.committed().get(name)) as writer:
                for row in made:
                    own = {key: row[key] for key in ("key", "uid", "status", "error")}
                    writer.write({**own, "status": "duplicate", "error": "again"} if row["key"] in left_out else own)
                writer.commit(rows_in=3, input_info={"digest": "d"})
        artifact.close()
        done = draw(shards, out, beside={MARKS: marks})
        assert draw(shards, second, Drawing(name="second", heeds=True), {"first": out}) == done
        return done

    assert marked("000002", "000012") == ["00000", "00001", "00002"] and marked("000002", "000012") == []
    before = [draws(out), draws(second)]
    for each in before:
        assert [key for key, number in each.items() if number is None] == ["000001", "000002", "000011", "000012"]
    assert marked("000000", "000012") == ["00000"]
    for made, was in zip((out, second), before, strict=True):
        now = draws(made)
        assert now.pop("000000") is None and was.pop("000000") is not None
        assert now.pop("000002") is not None and was.pop("000002") is None
        assert now == was and next(row["error"] for row in rows(made)) == "again"


@pytest.mark.parametrize("size", [2, 3, 20])
def test_final_shards_follow(listed: Path, tmp_path: Path, size: int) -> None:
    """Those made of the mended shard are written anew, and those whose bounds it moves; the rest stays as it is."""
    shards, config = tmp_path / "shards", SelectConfig(keep="clip_score > 0", shard_size=size)

    def select(scores: Artifact, out: str) -> dict[str, bytes]:
        select_step(scores, str(shards), str(tmp_path / out), config, workers=0)
        assert verify(str(tmp_path / out)).faults == []
        return {path.name: path.read_bytes() for path in (tmp_path / out).glob("0*") if path.suffix != ".json"}

    ingest(listed, out=shards, shard_size=3)
    scores = write_scores(shards, tmp_path / "scores")
    before = select(scores, "final")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "final").glob("*.tar")}
    assert select(scores, "final") == before
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "final").glob("*.tar")} == times
    mend(listed, 4)
    ingest(listed, out=shards, shard_size=3)
    alone = write_scores(shards, tmp_path / "alone")
    scores.retract(scores.committed()["00001"])
    with scores.begin("00001", SCORE) as out:
        for row in alone.read_rows("00001"):
            out.write(row)
        out.commit(rows_in=3, input_info=alone.committed()["00001"].input)
    assert select(scores, "final") == select(alone, "final alone") != before
    same = {name for name, time in times.items() if (tmp_path / "final" / name).stat().st_mtime_ns == time}
    assert ("00000.tar" in same) == (size < 20)


def test_an_export_follows_unless_its_cuts_would_move(listed: Path, tmp_path: Path) -> None:
    """Only the shard of the mended row is written again; one that would hold other rows is refused."""
    shards, out, cut = tmp_path / "shards", tmp_path / "out", tmp_path / "cut"
    ingest(listed, out=shards, shard_size=3)
    export(shards, out)
    export(shards, cut, shard_size=2)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    mend(listed, 4)
    ingest(listed, out=shards, shard_size=3)
    export(shards, out)
    assert verify(str(out)).faults == [] and len([row for row in rows(out) if row["status"] == "ok"]) == 8
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert {name for name in after if after[name] != before[name]} == {"00001.tar"}
    with pytest.raises(ArtifactMismatch, match="since this export was made; use another --out, or --fresh"):
        export(shards, cut, shard_size=2)
