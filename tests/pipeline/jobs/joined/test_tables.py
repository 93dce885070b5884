"""A user's table as an artifact with the shards' rows: made once, kept, and made anew where something changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.joining import table as tables
from capipe.manifests.joining.table import open_table
from capipe.manifests.shards import Row, RowReader, expand
from capipe.manifests.withdrawal.uid_set import UidSet
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.jobs.joined import tables as jobs
from capipe.pipeline.jobs.joined.tables import join_table

from ....stages.ingesting import ingest, rows
from ....stages.scored import foreign_shards, plain, write_scores

SIZES = [6, 3, 5]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return foreign_shards(tmp_path / "shards", SIZES)


def images(shards: Path) -> list[Row]:
    return [row for shard in expand(str(shards)) for row in RowReader(shard)]


def write(path: Path, found: list[Row], **columns: Any) -> Path:
    pq.write_table(pa.table({"uid": [row.uid for row in found], **columns}), path)
    return path


def joined(table: Path, scores: Artifact, shards: Path, out: Path, **options: Any) -> Artifact:
    opened = open_table(str(table))
    made = join_table(opened, list(opened.columns), scores, str(shards), str(out), **options)
    assert made is not None
    return made


def test_a_row_for_every_row(shards: Path, tmp_path: Path) -> None:
    """With the values that the table has; rows that are not ok keep their reason, and others have one."""
    found = images(shards)
    scores = write_scores(
        shards, tmp_path / "scores", lambda i, row: {"status": "empty", "error": "none"} if i == 1 else plain(i, row)
    )
    table = write(tmp_path / "mine.parquet", found[:-2], x=list(range(12)))
    made = joined(table, scores, shards, tmp_path / "out")
    listed = rows(tmp_path / "out")
    assert [(row["key"], row["uid"]) for row in listed] == [(row.key, row.uid) for row in found]
    assert [row["x"] for row in listed] == [*range(12), None, None]
    assert [row["status"] for row in listed] == ["ok", "empty", *["ok"] * 10, "missing", "missing"]
    assert {row["error"] for row in listed} == {None, "none", "no row of the table is of its uid"}
    assert verify(made.url).faults == verify(made.url).notes == []


def test_rows_are_those_of_the_input(tmp_path: Path, shards: Path) -> None:
    """Of shards of ours `verify` compares them, and failed rows are rows here, too."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.jpg").write_bytes(b"\xff\xd8\xff")
    ingest(shards, tmp_path / "broken", out=tmp_path / "ours", shard_size=4)
    scores = write_scores(tmp_path / "ours", tmp_path / "scores")
    table = write(tmp_path / "mine.parquet", images(shards), x=[1.5] * 14)
    joined(table, scores, tmp_path / "ours", tmp_path / "out")
    assert verify(str(tmp_path / "out")).faults == []
    assert [row["x"] for row in rows(tmp_path / "out") if row["status"] == "ok"] == [1.5] * 14
    assert sum(row["status"] == "corrupt" for row in rows(tmp_path / "out")) == 1


def test_it_is_read_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, found = write_scores(shards, tmp_path / "scores"), images(shards)
    table = write(tmp_path / "mine.parquet", found, x=list(range(14)))
    joined(table, scores, shards, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(jobs, "read_table", lambda *_: pytest.fail("read again"))
        joined(table, scores, shards, tmp_path / "out")
    write(table, found, x=[0] * 14)
    joined(table, scores, shards, tmp_path / "out")
    assert {row["x"] for row in rows(tmp_path / "out")} == {0}


def test_a_join_that_was_stopped_goes_on(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are there stay; the whole is what one run makes."""
    scores = write_scores(shards, tmp_path / "scores")
    table = write(tmp_path / "mine.parquet", images(shards), x=list(range(14)))
    kept = jobs.joined_rows

    def stopping(listed: Any, shard: str, *rest: Any) -> Any:
        if shard == "00001":
            raise KeyboardInterrupt
        return kept(listed, shard, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "joined_rows", stopping)
        with pytest.raises(KeyboardInterrupt):
            joined(table, scores, shards, tmp_path / "out")
    assert list(Artifact.open(str(tmp_path / "out")).committed()) == ["00000"]
    stamp = (tmp_path / "out/00000.parquet").stat().st_mtime_ns
    joined(table, scores, shards, tmp_path / "out")
    assert (tmp_path / "out/00000.parquet").stat().st_mtime_ns == stamp
    joined(table, scores, shards, tmp_path / "alone")
    for name in ("00000", "00001", "00002"):
        one, other = (tmp_path / folder / f"{name}.parquet" for folder in ("out", "alone"))
        assert one.read_bytes() == other.read_bytes()


def test_a_signal_stops_it_after_a_shard(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = write_scores(shards, tmp_path / "scores")
    table = open_table(str(write(tmp_path / "mine.parquet", images(shards), x=list(range(14)))))
    stops: list[Callable[[], None]] = []
    monkeypatch.setattr(jobs, "interrupts", lambda stop: nullcontext(stops.append(stop)))
    kept = jobs.joined_rows
    monkeypatch.setattr(jobs, "joined_rows", lambda *given: (stops[0](), kept(*given))[1])
    assert join_table(table, ["x"], scores, str(shards), str(tmp_path / "out")) is None
    assert list(Artifact.open(str(tmp_path / "out")).committed()) == ["00000"]


def test_shards_that_were_scored_again_are_joined_again(shards: Path, tmp_path: Path) -> None:
    """Only these: their rows may be others now."""
    found = images(shards)
    write_scores(
        shards, tmp_path / "scores", lambda i, row: {**plain(i, row), "re_length": 8} if i == 0 else plain(i, row)
    )
    table = write(tmp_path / "mine.parquet", found, x=list(range(14)))
    scores = Artifact.open(str(tmp_path / "scores"))
    joined(table, scores, shards, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    again = write_scores(shards, tmp_path / "again")
    for name in ("00000.parquet", "00000_stats.json"):
        (tmp_path / "scores" / name).write_bytes((tmp_path / "again" / name).read_bytes())
    lines = (tmp_path / "again/_capipe/manifest.jsonl").read_text().splitlines()
    with (tmp_path / "scores/_capipe/manifest.jsonl").open("a") as manifest:
        manifest.write(next(line for line in lines if '"00000"' in line) + "\n")
    assert again.fingerprint == scores.fingerprint
    joined(table, Artifact.open(str(tmp_path / "scores")), shards, tmp_path / "out")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert {name for name in before if before[name] != after[name]} == {"00000.parquet"}
    assert [row["x"] for row in rows(tmp_path / "out")] == list(range(14))


def test_processes_that_share_join_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits and reads what the first has made. Another table is refused while others may use this one."""
    scores, found = write_scores(shards, tmp_path / "scores"), images(shards)
    table = write(tmp_path / "mine.parquet", found, x=list(range(14)))
    reads: list[str] = []
    kept = tables.read_table

    def counted(*given: Any) -> Any:
        reads.append("read")
        return kept(*given)

    monkeypatch.setattr(jobs, "read_table", counted)
    made: list[Artifact] = []
    threads = [
        threading.Thread(target=lambda: made.append(joined(table, scores, shards, tmp_path / "out", share=True)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and reads == ["read"] and len(rows(tmp_path / "out")) == 14
    write(table, found, x=[0] * 14)
    with pytest.raises(BadInput, match=r"contents: .* run the command once without --share, which joins the table"):
        joined(table, scores, shards, tmp_path / "out", share=True)


def test_a_longer_list_takes_values_back(shards: Path, tmp_path: Path) -> None:
    scores, found = write_scores(shards, tmp_path / "scores"), images(shards)
    table = write(tmp_path / "mine.parquet", found, x=list(range(14)))
    first = UidSet.of([found[0].uid or ""], "list")
    joined(table, scores, shards, tmp_path / "out", drop=first)
    more = UidSet.of([found[0].uid or "", found[7].uid or ""], "list")
    joined(table, scores, shards, tmp_path / "out", drop=more)
    assert [row["x"] for row in rows(tmp_path / "out")] == [None, *range(1, 7), None, *range(8, 14)]
    with pytest.raises(BadInput, match="made with --drop"):
        joined(table, scores, shards, tmp_path / "out")


def test_a_table_of_other_images_is_refused(shards: Path, tmp_path: Path) -> None:
    scores = write_scores(shards, tmp_path / "scores")
    other = images(foreign_shards(tmp_path / "others", [20]))[14:]
    table = write(tmp_path / "mine.parquet", other, x=list(range(6)))
    with pytest.raises(BadInput, match="none of its 6 rows is of these shards by uid; give a table of these images"):
        joined(table, scores, shards, tmp_path / "out")
