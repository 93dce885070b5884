"""`capipe filter` with several sources of columns: earlier scores, answers of another stage, tables of users."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.shards import Row, RowReader, expand
from capipe.pipeline.cli import main
from capipe.pipeline.inspect.verify import verify

from ...stages.ingesting import ingest
from ...stages.scored import clip, foreign_shards, plain, write_columns, write_marks, write_scores
from ..conftest import capipe, one_line, table

SIZES = [10, 4, 12, 6]
KEEP = "ask_watermark < 0.5 and clip_score > 0.2 and stars >= 3"


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images with scores by a CLIP, answers about them, and a table with stars for most of them."""
    foreign_shards(tmp_path / "shards", SIZES)
    write_scores(tmp_path / "shards", tmp_path / "scores", scorers={"clip": {}})
    write_columns(tmp_path / "shards", tmp_path / "asked", {"ask_watermark": pa.float32()}, watermark)
    rows = images(tmp_path / "shards")
    stars = {"uid": [row.uid for row in rows[::-1]][:-5], "stars": [index % 6 for index in range(32)][::-1][:-5]}
    pq.write_table(pa.table(stars), tmp_path / "mine.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shards"


def images(shards: Path) -> list[Row]:
    return [row for shard in expand(str(shards)) for row in RowReader(shard)]


def watermark(index: int, row: Row) -> Mapping[str, Any]:
    if index % 9 == 8:
        return {"status": "engine_error", "error": "the server was away"}
    return {"ask_watermark": clip(index + 1000)}


def expected(index: int) -> bool:
    """Whether a row passes :data:`KEEP`, by Python's own rules."""
    answered = index % 9 != 8 and clip(index + 1000) < 0.5
    return answered and clip(index) > 0.2 and index >= 5 and index % 6 >= 3


def options(*more: object, keep: str = KEEP) -> list[object]:
    named = [word for place in ("scores", "asked", "mine.parquet") for word in ("--scores", place)]
    return ["filter", "--shards", "shards", *named, "--keep", keep, "--shard-size", 6, *more]


def refusal(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """What a refused command says, run in this process: its last line, beside what it was doing."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["capipe", *map(str, words), "--out", "out"])
    monkeypatch.setattr(sys, "stderr", said)
    with pytest.raises(SystemExit) as ended:
        main()
    lines = said.getvalue().splitlines()
    assert ended.value.code == 2 and [line.startswith("capipe: ") for line in lines].index(True) == len(lines) - 1
    return lines[-1]


def test_a_condition_over_three_sources(shards: Path, tmp_path: Path) -> None:
    done = capipe(*options("--out", "out"))
    rows = table(tmp_path / "out/shards")
    assert [row["status"] == "ok" for row in rows] == [expected(index) for index in range(32)]
    assert 0 < sum(map(expected, range(32))) < 20
    assert [row["stars"] for row in rows] == [None] * 5 + [index % 6 for index in range(5, 32)]
    assert [row["ask_watermark"] is None for row in rows] == [index % 9 == 8 for index in range(32)]
    assert "asked: has no value of 3 of 32 candidates" in done.stderr
    assert "mine.parquet: has no value of 5 of 32 candidates" in done.stderr
    assert "mine.parquet: its 27 rows are joined by uid" in done.stderr
    missing = [row["error"] for row in rows[:5] if row["status"] == "filtered" and "stars" in row["error"]]
    assert missing and set(missing) == {"stars >= 3: stars is missing"}
    for place in ("out/shards", "out/joined/mine"):
        found = verify(str(tmp_path / place))
        assert found.faults == found.notes == []
    report = (tmp_path / "out/shards/_capipe/report.html").read_text()
    assert "ask_watermark" in report and "stars" in report and "3 of 32 candidates in asked" in report
    meta = json.loads(members(tmp_path / "out/shards")["00000"][0])
    row = next(row for row in rows if row["status"] == "ok")
    assert meta["stars"] == row["stars"] and meta["ask_watermark"] == pytest.approx(row["ask_watermark"])


def members(folder: Path) -> dict[str, list[bytes]]:
    """The JSON of all samples, by shard."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".json")]
            found[path.stem] = [file.read() for file in files if file is not None]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_an_index_and_its_export_have_the_columns(shards: Path, tmp_path: Path) -> None:
    capipe(*options("--out", "copied"))
    capipe(*options("--out", "index", "--index"))
    assert table(tmp_path / "index/shards") == table(tmp_path / "copied/shards")
    for name in ("copied", "index"):
        capipe("export", f"{name}/shards", "--out", f"of-{name}", "--license", "mit", "--title", "Same")
    assert members(tmp_path / "of-index") == members(tmp_path / "of-copied") != {}
    cards = [(tmp_path / f"of-{name}/README.md").read_text().partition("## Provenance") for name in ("copied", "index")]
    assert cards[0][0] == cards[1][0]
    assert "| `ask_watermark` |" in cards[0][0] and "| `stars` |" in cards[0][0]
    assert "asked" in cards[0][2] and "joined" not in cards[0][0]
    assert verify(str(tmp_path / "of-index")).faults == []
    capipe("report", "index", "--out", "page.html")
    assert "ask_watermark" in (tmp_path / "page.html").read_text()


def test_nothing_is_joined_twice(shards: Path, tmp_path: Path) -> None:
    """Another condition reads the table's digest; more processes, and the other order of options, write the same."""
    capipe(*options("--out", "out", "--workers", 0))
    before = contents(tmp_path / "out/shards")
    stamp = (tmp_path / "out/joined/mine/00000.parquet").stat().st_mtime_ns
    again = capipe(*options("--out", "out", "--fresh", keep="stars > 1 or ask_watermark is null"))
    assert "are joined by" not in again.stderr
    assert (tmp_path / "out/joined/mine/00000.parquet").stat().st_mtime_ns == stamp
    reverse = [word for place in ("mine.parquet", "asked", "scores") for word in ("--scores", place)]
    asked = ["filter", "--shards", "shards", *reverse, "--keep", KEEP, "--shard-size", 6, "--workers", 2]
    capipe(*asked, "--out", "out", "--fresh")
    assert contents(tmp_path / "out/shards") == before
    resumed = capipe(*options("--out", "out"))
    assert "0 images" in resumed.stderr


def test_another_table_is_another_selection(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capipe(*options("--out", "out"))
    rows = images(shards)
    pq.write_table(pa.table({"uid": [row.uid for row in rows], "stars": [5] * 32}), "mine.parquet")
    said = refusal(monkeypatch, *options())
    assert "made by another configuration (scores-" in said and "--fresh" in said
    capipe(*options("--out", "out", "--fresh"))
    assert {row["stars"] for row in table(tmp_path / "out/shards")} == {5}


def test_a_dry_run_joins_and_writes_nothing(shards: Path, tmp_path: Path) -> None:
    told = capipe(*options("--out", "out", "--dry-run")).stdout.splitlines()
    kept = sum(map(expected, range(32)))
    assert f"{kept} of 32 candidates are kept" in told[0] and "mine.parquet: has no value of 5" in told[2]
    assert len(told) == 4 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scores", "scores", "--scores", "none"], "none: no such file or folder; --scores takes artifacts"),
        (["--scores", "scores", "--scores", "shards"], "shards: not an artifact of capipe, and no .parquet"),
        (["--scores", "scores", "--keep", "ask_watermark < 1"], "no column 'ask_watermark'"),
        (["--scores", "scores", "--scores", "asked", "--keep", "ask_watermak < 1"], "did you mean ask_watermark"),
        (["--scores", "scores", "--scores", "asked", "--scores", "asked"], "'ask_watermark' is in asked, too"),
        (["--scores", "scores", "--scores", "a=asked", "--scores", "a=mine.parquet"], "a=…: is given twice"),
        (["--scores", "scores", "--scores", "scores"], "its column 're_clip_score' is in scores, too"),
        (["--scores", "a=scores"], "--scores a=scores: scores with a name give no captions to write"),
        (["--scores", "scores", "--clip", "tiny/clip"], "scores: scored already by --clip; leave that out"),
        (["--scores", "scores", "--captions", "asked"], "those of --scores scores are scored already"),
        (["--scores", "scores", "--scores", "marks"], "stage 'dedup', without a column of numbers or text"),
        (["--scores", "scores", "--scores", "words.parquet"], "words.parquet: has columns of text alone"),
        (["--scores", "scores", "--scores", "mine.parquet", "--top", "0.5", "--by", "star"], "did you mean stars"),
        (["--scores", "scores", "--scores", "others.parquet"], "none of its 1 rows is of these shards by uid; give a"),
        (["--scores", "scores", "--scores", "keys.parquet"], "by key and uid; give a table of these images, or leave"),
        (["--scores", "scores", "--scores", "x/mine.parquet", "--scores", "mine.parquet"], "'stars' is in x/mine"),
        (["--scores", "scores", "--scores", "p=x/mine.parquet", "--scores", "p.parquet"], "p.parquet: is called p, as"),
    ],
)
def test_bad_sources_are_one_line(
    words: list[str], said: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is selected; of a table that fits no image its join is all that was written."""
    write_marks(shards, "marks", lambda index, row: {})
    uid = images(shards)[0].uid
    for name, columns in {
        "words": {"uid": [uid], "url": ["a"]},
        "others": {"uid": ["f" * 32], "x": [1]},
        "keys": {"uid": [uid], "key": ["other"], "x": [1]},
        "p": {"uid": [uid], "y": [1]},
    }.items():
        pq.write_table(pa.table(columns), f"{name}.parquet")
    (tmp_path / "x").mkdir()
    shutil.copy("mine.parquet", "x/mine.parquet")
    assert said in refusal(monkeypatch, "filter", "--shards", "shards", *words)
    assert not (tmp_path / "out/shards").exists()


def test_two_models_of_one_kind(shards: Path, tmp_path: Path) -> None:
    write_scores(shards, "big", lambda index, row: {**plain(index, row), "re_clip_score": 1 - clip(index)}, seed=1)
    words = ["--scores", "scores", "--scores", "big=big", "--keep", "big_clip_score > clip_score"]
    capipe("filter", "--shards", "shards", *words, "--out", "out")
    rows = table(tmp_path / "out/shards")
    assert [row["status"] == "ok" for row in rows] == [row["big_re_clip_score"] > row["re_clip_score"] for row in rows]


def test_scores_by_another_model_of_the_same_captions(shards: Path, tmp_path: Path) -> None:
    """Its columns fill those that the first scores have empty; other captions are refused."""

    def by_itm(index: int, row: Row) -> Mapping[str, Any]:
        kept = {name: value for name, value in plain(index, row).items() if "clip" not in name}
        return {**kept, "re_itm_score": clip(index + 7)}

    write_scores(shards, "itm", by_itm, scorers={"itm": {}})
    words = ["filter", "--shards", "shards", "--scores", "scores", "--keep", "itm_score > clip_score"]
    capipe(*words, "--scores", "itm", "--out", "out")
    rows = table(tmp_path / "out/shards")
    assert [row["status"] == "ok" for row in rows] == [clip(i + 7) > clip(i) for i in range(32)]
    assert "select" not in pq.read_schema(tmp_path / "out/shards/00000.parquet").names
    others = lambda index, row: {**by_itm(index, row), "re_caption": "Another."}  # noqa: E731
    write_scores(shards, "theirs", others, scorers={"itm": {}}, captions="0" * 64)
    refused = capipe(*words, "--scores", "theirs", "--out", "new", code=2)
    assert "--scores theirs: of other new captions than are to be written" in one_line(refused)
    write_scores(shards, "unsaid", others, scorers={"itm": {}})
    failed = capipe(*words, "--scores", "unsaid", "--out", "new", code=2)
    assert "the scores of '0000' are of another re_caption" in failed.stderr


def test_captions_alone_are_described_where_no_scores_have_any(shards: Path, tmp_path: Path) -> None:
    """No model is loaded: what `filter` writes of the tars' own captions is their length and language."""
    words = ["--scores", "asked", "--keep", "ask_watermark < 0.5 and length == 2", "--index"]
    capipe("filter", "--shards", "shards", *words, "--out", "out")
    rows = table(tmp_path / "out/shards")
    assert [row["status"] == "ok" for row in rows] == [
        index % 9 != 8 and clip(index + 1000) < 0.5 for index in range(32)
    ]
    assert {row["caption"] for row in rows if row["status"] == "ok"} <= {f"alt {index}" for index in range(32)}
    assert {row["org_clip_score"] for row in table(tmp_path / "out/scores")} == {None}
    again = capipe("filter", "--shards", "shards", *words, "--out", "out")
    assert "0 images" in again.stderr


def test_tables_by_shard_and_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of copies of an image each has its own value; by uid they share one, as captions of an image do."""
    monkeypatch.chdir(tmp_path)
    foreign = foreign_shards(tmp_path / "theirs", [6])
    shutil.copy(foreign / "00000.tar", foreign / "00001.tar")
    write_scores(foreign, "scores", scorers={"clip": {}})
    rows = [(shard.name, row) for shard in expand(str(foreign)) for row in RowReader(shard)]
    mine = {"shard": [shard for shard, _ in rows], "key": [row.key for _, row in rows], "x": list(range(12))}
    pq.write_table(pa.table(mine), "mine.parquet")
    pq.write_table(pa.table({"uid": [row.uid for _, row in rows[:6]], "y": list(range(6))}), "uids.parquet")
    words = ["--scores", "scores", "--scores", "mine.parquet", "--scores", "uids.parquet", "--keep", "x >= 0"]
    capipe("filter", "--shards", "theirs", *words, "--out", "out")
    assert [(row["x"], row["y"]) for row in table(tmp_path / "out/shards")] == [(n, n % 6) for n in range(12)]


def test_rank_by_a_column_of_a_table(shards: Path, tmp_path: Path) -> None:
    words = ["--scores", "scores", "--scores", "s=mine.parquet", "--top", "0.3", "--by", "s_stars"]
    capipe("filter", "--shards", "shards", *words, "--out", "out")
    rows = table(tmp_path / "out/shards")
    assert {row["s_stars"] for row in rows if row["status"] == "ok"} == {4, 5}
    assert Artifact.open(str(tmp_path / "out/shards")).config["semantic"]["threshold"] == "4.0"


def test_columns_of_ingest_and_of_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any artifact with a row for each row gives its numbers, and text that a condition names."""
    monkeypatch.chdir(tmp_path)
    foreign_shards(tmp_path / "theirs", [6, 3])
    ingest(tmp_path / "theirs", out=tmp_path / "ours", shard_size=5)
    write_scores(tmp_path / "ours", "scores", scorers={"clip": {}})
    words = ["--scores", "scores", "--scores", "ours", "--scores", "i=ours"]
    capipe("filter", "--shards", "ours", *words, "--keep", 'width > 1 and i_format == "jpg"', "--out", "out")
    rows = table(tmp_path / "out/shards")
    assert [row["status"] == "ok" for row in rows] == [row["i_format"] == "jpg" for row in rows]
    assert "format" not in rows[0] and rows[0]["width"] == rows[0]["i_width"]
    capipe("export", "out/shards", "--out", "final", "--license", "mit")


def test_withdrawn_images_leave_no_value(shards: Path, tmp_path: Path) -> None:
    capipe(*options("--out", "out"))
    rows = images(shards)
    gone = [next(index for index in range(32) if expected(index)), 31]
    (tmp_path / "drop.txt").write_text("".join(f"{rows[index].uid}\n" for index in gone))
    stamp = (tmp_path / "out/joined/mine/00001.parquet").stat().st_mtime_ns
    capipe(*options("--out", "out", "--drop", "drop.txt"))
    assert (tmp_path / "out/joined/mine/00001.parquet").stat().st_mtime_ns == stamp
    for folder in ("out/shards", "out/joined/mine"):
        found = table(tmp_path / folder)
        assert [index for index, row in enumerate(found) if row["status"] == "withdrawn"] == gone
        assert {found[index]["stars"] for index in gone} == {None}
        capipe("verify", folder, "--absent", "drop.txt")
    assert "made with --drop" in one_line(capipe(*options("--out", "out"), code=2))


def test_no_model_is_near(shards: Path) -> None:
    """Sources are opened and joined without importing torch."""
    code = (
        "import sys; from capipe.pipeline.cli import app; import contextlib\n"
        "with contextlib.suppress(SystemExit): app()\n"
        "print('loaded:', [m for m in ('torch', 'transformers', 'open_clip') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, *map(str, options("--out", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "loaded: []" in done.stdout and "shards committed" in done.stdout


def test_images_without_captions_are_selected_before_they_get_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--text none`: by what was asked about the images alone; the index then says which of them to caption."""
    monkeypatch.chdir(tmp_path)
    pictures = [row.image for row in images(foreign_shards(tmp_path / "theirs", [6]))]
    (tmp_path / "photos").mkdir()
    for number, picture in enumerate(pictures):
        (tmp_path / f"photos/{number}.jpg").write_bytes(picture or b"")
    (tmp_path / "photos/6.jpg").write_bytes(b"\xff\xd8\xff")
    ingest(tmp_path / "photos", out=tmp_path / "ours")
    write_columns(tmp_path / "ours", "asked", {"ask_collage": pa.float32()}, lambda i, row: {"ask_collage": i / 7})
    words = ["filter", "--shards", "ours", "--scores", "asked", "--keep", "ask_collage < 0.5"]
    refused = capipe(*words, "--out", "with", code=2)
    assert "no row has a org_caption to write and is not marked" in one_line(refused)
    for name, index in (("copied", []), ("index", ["--index"])):
        capipe(*words, "--text", "none", *index, "--out", name)
        found = verify(str(tmp_path / name / "shards"))
        assert found.faults == []
    rows = table(tmp_path / "copied/shards")
    assert rows == table(tmp_path / "index/shards")
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["filtered"] * 2 + ["corrupt"]
    assert {row["caption"] for row in rows} == {None}
    with tarfile.open(tmp_path / "copied/shards/00000.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"jpg", "png", "webp", "txt", "json"}
    capipe("export", "index/shards", "--out", "final", "--license", "mit", "--format", "webdataset")
    assert verify(str(tmp_path / "final")).faults == []
