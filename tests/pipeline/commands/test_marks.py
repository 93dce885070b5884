"""`--marks` of `capipe annotate` and its like: rows that are left out cost no request and no decoding."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from capipe.manifests.artifact import Artifact
from capipe.pipeline.inspect.verify import verify

from ...stages.scored import foreign_shards, plain, write_marks, write_scores
from ..conftest import COMMAND, CaptionServer, capipe, one_line, table
from ..killing import run_killed
from ..sharing import same_shards

SIZES = [8, 5, 7]


def every_third(index: int, row: Any) -> dict[str, Any]:
    status = "contaminated" if index % 6 else "duplicate"
    return {} if index % 3 else {"status": status, "error": f"row {index}"}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return foreign_shards(tmp_path / "shards", SIZES)


@pytest.fixture
def marks(shards: Path, tmp_path: Path) -> Path:
    write_marks(shards, tmp_path / "marks", every_third)
    return tmp_path / "marks"


def words(command: str, shards: object, out: object, server: CaptionServer, *more: object) -> list[object]:
    return [
        command,
        "--shards",
        shards,
        "--out",
        out,
        "--model",
        "m",
        "--engine",
        server.url,
        "--concurrency",
        2,
        *more,
    ]


def test_rows_that_are_not_ok_there_are_left_out_with_that_status(
    shards: Path, marks: Path, tmp_path: Path, server: CaptionServer
) -> None:
    out = tmp_path / "out"
    command = words("annotate", shards, out, server, "--marks", marks, "--pack")
    told = capipe(*command).stderr
    assert "marks: 13 of 20 rows are left to do (3 contaminated, 4 duplicate)" in told
    rows = table(out)
    assert Counter(row["status"] for row in rows) == {"ok": 13, "duplicate": 4, "contaminated": 3}
    assert server.requests == 13 and len(rows) == sum(SIZES)
    assert rows[3] == {**rows[3], "status": "contaminated", "error": "row 3", "captions": [], "text": "alt 3"}
    assert all(row["captions"] for row in rows if row["status"] == "ok")
    assert verify(str(out)).faults == []
    assert Artifact.open(str(out)).config["semantic"]["marks"] == Artifact.open(str(marks)).fingerprint
    capipe(*command)
    assert server.requests == 13
    without = [word for word in command if word not in ("--marks", marks)]
    assert "marks: " in one_line(capipe(*without, code=2)) and "-> null" in one_line(capipe(*without, code=2))


def test_what_is_left_is_captioned_as_without_marks(
    shards: Path, marks: Path, tmp_path: Path, server: CaptionServer
) -> None:
    capipe(*words("annotate", shards, tmp_path / "all", server))
    capipe(*words("annotate", shards, tmp_path / "some", server, "--marks", marks))
    both = zip(table(tmp_path / "all"), table(tmp_path / "some"), strict=True)
    assert all(slow == fast for slow, fast in both if fast["status"] == "ok")


def test_no_row_that_is_left_out_is_decoded(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    """A row whose image cannot be read keeps the mark's status: nobody looked."""
    broken = {f"{shard:05d}.tar": (shards / f"{shard:05d}.tar").read_bytes() for shard in range(3)}
    for name, data in broken.items():  # the start of every JPEG's and PNG's pixels is overwritten
        (shards / name).write_bytes(data.replace(b"\xff\xda", b"\0\0").replace(b"IDAT", b"NOPE"))
    write_marks(shards, tmp_path / "none", lambda index, row: {"status": "duplicate", "error": "again"})
    capipe(*words("annotate", shards, tmp_path / "out", server, "--marks", tmp_path / "none"))
    assert {row["status"] for row in table(tmp_path / "out")} == {"duplicate"} and server.requests == 0
    capipe(*words("annotate", shards, tmp_path / "seen", server))
    assert "corrupt" in {row["status"] for row in table(tmp_path / "seen")}


def test_marks_of_other_images_are_refused_at_the_start(
    shards: Path, marks: Path, tmp_path: Path, server: CaptionServer
) -> None:
    out = tmp_path / "out"
    others = foreign_shards(tmp_path / "others", SIZES, "o{shard}{row:03d}")
    line = one_line(capipe(*words("annotate", others, out, server, "--marks", marks), code=2))
    assert "row 'o0000' expected, '0000' found; it was not made of these shards" in line
    more = foreign_shards(tmp_path / "more", [*SIZES, 2])
    line = one_line(capipe(*words("annotate", more, out, server, "--marks", marks), code=2))
    assert f"{marks}: has no shard 00003" in line and "narrow --shards" in line
    line = one_line(capipe(*words("annotate", shards, out, server, "--marks", shards), code=2))
    assert f"{shards}: not an artifact" in line
    assert not out.exists() and server.requests == 0


def test_a_selection_says_what_to_caption_without_a_copy_of_its_images(
    shards: Path, tmp_path: Path, server: CaptionServer
) -> None:
    """`filter --index` packs the rows of several shards into one; they are found by their shard."""
    write_scores(shards, tmp_path / "scores", lambda index, row: {**plain(index, row), "re_clip_score": index / 20})
    options = ("--scores", tmp_path / "scores", "--keep", "clip_score > 0.4", "--index")
    capipe("filter", "--shards", shards, "--out", tmp_path / "chosen", *options)
    assert [row["source_shard"] for row in table(tmp_path / "chosen/shards")] == ["00000"] * 8 + ["00001"] * 5 + [
        "00002"
    ] * 7
    capipe(*words("annotate", shards, tmp_path / "out", server, "--marks", tmp_path / "chosen/shards"))
    statuses = [row["status"] for row in table(tmp_path / "out")]
    assert statuses == ["filtered"] * 9 + ["ok"] * 11 and server.requests == 11
    reason = table(tmp_path / "out")[3]["error"]
    assert reason is not None and "clip_score" in reason
    capipe(*words("annotate", shards / "00001.tar", tmp_path / "one", server, "--marks", tmp_path / "chosen/shards"))
    assert [row["status"] for row in table(tmp_path / "one")] == ["filtered"] + ["ok"] * 4


def test_two_processes_share_the_work_and_get_the_same_shards(
    shards: Path, marks: Path, tmp_path: Path, server: CaptionServer
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    capipe(*words("annotate", shards, alone, server, "--marks", marks))
    command = words("annotate", shards, shared, server, "--marks", marks, "--share")
    both = [subprocess.Popen([*COMMAND, *map(str, command)], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    same_shards(shared, alone)


@pytest.mark.slow
def test_kills_cost_no_row(shards: Path, marks: Path, tmp_path: Path, server: CaptionServer) -> None:
    capipe(*words("annotate", shards, tmp_path / "alone", server, "--marks", marks, "--pack"))
    command = [*COMMAND, *words("annotate", shards, tmp_path / "out", server, "--marks", marks, "--pack")]
    run_killed(command, tmp_path / "out", len(SIZES), 3, seed=9)
    same_shards(tmp_path / "out", tmp_path / "alone")


def test_questions_are_written_about_what_marks_leave(
    shards: Path, marks: Path, tmp_path: Path, server: CaptionServer
) -> None:
    options = ("--screen", "none", "--max-attempts", 1, "--marks", marks)
    capipe(*words("qa", shards, tmp_path / "out", server, *options))
    rows = table(tmp_path / "out/written")
    assert Counter(row["status"] for row in rows)["duplicate"] == 4 and server.requests == 13


@pytest.mark.slow
def test_actors_of_a_cluster_leave_out_the_same_rows(
    shards: Path, marks: Path, tmp_path: Path, server: CaptionServer
) -> None:
    pytest.importorskip("ray")
    capipe(*words("annotate", shards, tmp_path / "alone", server, "--marks", marks))
    ray = ("--runner", "ray", "--ray-address", "local", "--ray-workers", 2)
    capipe(*words("annotate", shards, tmp_path / "out", server, "--marks", marks, *ray))
    same_shards(tmp_path / "out", tmp_path / "alone")
    assert server.requests == 2 * 13
