"""`capipe dedup --texts` and `--captions`, and `capipe filter` by their columns, as users run them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE
from capipe.manifests.shards import RowReader, expand
from capipe.manifests.status import Status

from ...conftest import photo, tar_bytes
from ...stages.copies import copies
from ...stages.scored import write_marks, write_scores
from ..conftest import capipe, one_line, table
from ..dedup_crash import contents, leftovers
from ..killing import committed, run_killed

pytest.importorskip("rensa", reason="the extra 'dedup' is not installed")

LONG = "an old man in a grey coat feeds brown pigeons on the steps of a church at noon in the low light of winter"
NEAR = LONG.replace("brown", "white")
TEXTS = [
    [LONG, "A dog.", "a dog", "", LONG + ".", None],
    [NEAR, "\0 \n", "A DOG!", "a cat", "一只猫在沙发上睡觉", "一只猫在沙发上睡觉。"],
]


def shards_of(folder: Path, texts: Sequence[Sequence[str | None]] = TEXTS, odd: tuple[int, int] | None = None) -> Path:
    """Shards with these texts; ``odd``: a row with another image."""
    folder.mkdir()
    for number, own in enumerate(texts):
        members: dict[str, bytes] = {}
        for index, text in enumerate(own):
            key = f"{number:05}{index:04}"
            members[f"{key}.png"] = photo(100 * number + index + 5000 * (odd == (number, index)), (40, 30), "PNG")
            if text is not None:
                members[f"{key}.txt"] = text.encode()
        (folder / f"{number:05}.tar").write_bytes(tar_bytes(members))
    return folder


def rows_of(marked: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in table(marked)}


def column(rows: Mapping[str, Mapping[str, Any]], name: str) -> list[Any]:
    return [rows[key][name] for key in sorted(rows)]


def write_captions(shards: Path, out: Path, text: str) -> Artifact:
    """An annotate artifact with one caption for all rows; the second row's failed."""
    artifact = Artifact.create(str(out), "annotate", {}, {"shards": str(shards)})
    for shard in expand(str(shards)):
        reader, count = RowReader(shard), 0
        with artifact.begin(shard.name, ANNOTATE) as file:
            for row in reader:
                status = Status.REFUSED if count == 1 else Status.OK
                caption = {"name": "short", "text": text, "status": str(status)}
                base = {"key": row.key, "uid": row.uid, "status": str(status), "text": row.text}
                file.write({**base, "captions": [caption]})
                count += 1
            file.commit(rows_in=count, input_info=reader.info)
    artifact.close()
    return artifact


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return shards_of(tmp_path / "in")


def test_groups_are_columns_and_a_second_run_does_nothing(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    capipe("dedup", "--shards", shards, "--out", out, "--texts")
    rows = rows_of(out / "marked")
    assert column(rows, "status") == ["ok"] * 12, "texts are counted only"
    assert column(rows, "text_copies") == [2, 3, 3, None, 2, None, 1, None, 3, 1, 2, 2]
    assert column(rows, "text_rows") == [3, 3, 3, None, 3, None, 3, None, 3, 1, 2, 2]
    groups = column(rows, "text_group")
    assert groups[0] == groups[4] == groups[6] and groups[1] == groups[2] == groups[8] and groups[10] == groups[11]
    assert len({*groups}) == 5 and [len(group) for group in groups if group] == [32] * 9
    assert sorted(rows[key]["text_rank"] for key in ("000000000", "000000004")) == [1, 2]
    assert rows["000010000"]["text_rank"] == 3 and 0.8 < rows["000010000"]["text_similarity"] < 0.95
    assert rows["000000000"]["text_similarity"] == 1.0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    capipe("dedup", "--shards", shards, "--out", out, "--texts")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    for artifact in ("hashes", "images", "texts", "marked"):
        assert "clean" in capipe("verify", out / artifact).stdout
        assert "2/2 shards committed" in capipe("status", out / artifact).stdout


def test_rows_beyond_per_text_are_duplicates(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    capipe("dedup", "--shards", shards, "--out", out, "--texts", "--per-text", 1)
    rows = rows_of(out / "marked")
    kept = {key for key, row in rows.items() if row["status"] == "ok"}
    assert {row["text_rank"] for key, row in rows.items() if key in kept} == {None, 1}
    assert {row["status"] for key, row in rows.items() if key not in kept} == {"duplicate"} and len(kept) == 7
    near = rows["000010000"]
    assert near["duplicate_of"] in kept & {"000000000", "000000004"} and "row 3 of 3, 1 are kept" in near["error"]
    assert near["error"].startswith(f"a text like (by {near['text_similarity']:.2f}) that of {near['duplicate_of']}: ")
    same = next(row for row in rows.values() if row["text_rank"] == 2 and row["text_rows"] == 2)
    assert same["error"] == f"the same text as {same['duplicate_of']}: row 2 of 2, 1 are kept"
    others = ["--texts", "--per-text", 2, "--text-threshold", 0.79]
    refused = one_line(capipe("dedup", "--shards", shards, "--out", out, *others, code=2))
    assert "texts.per_text: 1 -> 2" in refused and "texts.text_threshold: 0.8 -> 0.79" in refused
    before = {path: path.stat().st_mtime_ns for path in (out / "texts").rglob("*") if path.is_file()}
    capipe("dedup", "--shards", shards, "--out", out, *others, "--fresh")
    assert [row["text_rank"] for row in table(out / "marked") if row["status"] != "ok"] == [3, 3]
    assert before == {path: path.stat().st_mtime_ns for path in (out / "texts").rglob("*") if path.is_file()}


def test_the_order_of_shards_decides_nothing(tmp_path: Path) -> None:
    one, other = shards_of(tmp_path / "one"), tmp_path / "other"
    other.mkdir()
    (one / "00000.tar").rename(tmp_path / "first")
    for name, source in (("00007", one / "00001.tar"), ("00009", tmp_path / "first")):
        (other / f"{name}.tar").write_bytes(source.read_bytes())
    (tmp_path / "first").rename(one / "00000.tar")
    for shards in (one, other):
        capipe("dedup", "--shards", shards, "--out", f"{shards}-out", "--texts", "--per-text", 1)
    assert rows_of(Path(f"{one}-out/marked")) == rows_of(Path(f"{other}-out/marked"))


def test_copies_of_an_image_are_no_copies_of_its_text(tmp_path: Path) -> None:
    shards, picture = tmp_path / "in", photo(1, (320, 240))
    shards.mkdir()
    members = {"a.jpg": picture, "a.txt": b"a dog", "b.jpg": copies(picture)["jpeg q60"], "b.txt": b"a dog"}
    members |= {"c.jpg": photo(2, (320, 240)), "c.txt": b"a dog", "d.jpg": b"<html>", "d.txt": b"a dog"}
    (shards / "0.tar").write_bytes(tar_bytes(members))
    capipe("dedup", "--shards", shards, "--out", tmp_path / "out", "--texts")
    rows = rows_of(tmp_path / "out/marked")
    assert sorted(column(rows, "status")) == ["duplicate", "ok", "ok", "unsupported"]
    ok = [row for row in rows.values() if row["status"] == "ok"]
    assert [row["text_copies"] for row in ok] == [2, 2] and sorted(row["text_rank"] for row in ok) == [1, 2]
    assert all(row["text_group"] is None for row in rows.values() if row["status"] != "ok")


def test_captions_are_added_to_marks_of_an_earlier_run(shards: Path, tmp_path: Path) -> None:
    """No image is read again; the rows are those of the marks, with columns."""
    capipe("dedup", "--shards", shards, "--out", tmp_path / "images")
    write_captions(shards, tmp_path / "captions", "a photo of a thing")
    out = tmp_path / "out"
    options = ["--captions", tmp_path / "captions", "--marks", tmp_path / "images/marked", "--per-text", 3]
    capipe("dedup", "--shards", shards, "--out", out, *options)
    assert sorted(path.name for path in out.iterdir()) == ["marked", "texts"]
    before, rows = rows_of(tmp_path / "images/marked"), rows_of(out / "marked")
    same = [name for name in before["000000000"] if name not in ("status", "error", "duplicate_of")]
    assert [{name: row[name] for name in same} for row in rows.values()] == [
        {name: row[name] for name in same} for row in before.values()
    ]
    assert column(rows, "text_copies").count(10) == 10 and column(rows, "text_copies").count(None) == 2
    assert column(rows, "status").count("duplicate") == 7
    assert "clean" in capipe("verify", out / "marked").stdout


def test_shards_of_ours_give_what_their_tars_give(shards: Path, tmp_path: Path) -> None:
    """The Parquet beside an ingested tar has the text: the tar is read for its images alone."""
    ours = tmp_path / "ours"
    capipe("ingest", shards, "--out", ours, "--shard-size", 6)
    capipe("dedup", "--shards", ours, "--out", tmp_path / "a", "--texts")
    capipe("dedup", "--shards", shards, "--out", tmp_path / "b", "--texts")
    names = ["uid", "text_group", "text_copies", "text_rows", "text_rank", "text_similarity"]
    one, other = (sorted(table(tmp_path / name / "marked"), key=lambda row: row["uid"]) for name in "ab")
    assert [[row[name] for name in names] for row in one] == [[row[name] for name in names] for row in other]


def test_filter_keeps_by_columns_of_the_marks(shards: Path, tmp_path: Path) -> None:
    capipe("dedup", "--shards", shards, "--out", tmp_path / "dedup", "--texts")
    write_scores(shards, tmp_path / "scores")
    options = ["filter", "--shards", shards, "--scores", tmp_path / "scores", "--out", tmp_path / "out"]
    keep = ["--keep", "text_rank <= 2 and width >= 10 and length > 1", "--marks", tmp_path / "dedup/marked"]
    said = capipe(*options, *keep, "--dry-run").stdout
    assert "7 of 12 candidates are kept" in said
    capipe(*options, *keep)
    final = {row["source_key"]: row for row in table(tmp_path / "out/shards")}
    marks = rows_of(tmp_path / "dedup/marked")
    ranks = {key: marks[key]["text_rank"] for key in marks}
    assert {key for key, row in final.items() if row["status"] == "ok"} == {
        k for k, rank in ranks.items() if rank in (1, 2)
    }
    assert final["000010000"]["error"] == "text_rank <= 2: text_rank is 3"
    assert final["000000003"]["error"] == "text_rank <= 2: text_rank is missing"
    page = (tmp_path / "out/shards/_capipe/report.html").read_text()
    assert "text_rank" in page
    assert "clean" in capipe("verify", tmp_path / "out/shards").stdout


def test_columns_that_are_not_there_are_refused(shards: Path, tmp_path: Path) -> None:
    capipe("dedup", "--shards", shards, "--out", tmp_path / "dedup")
    write_scores(shards, tmp_path / "scores")
    options = ["filter", "--shards", shards, "--scores", tmp_path / "scores", "--out", tmp_path / "out"]
    refused = one_line(capipe(*options, "--keep", "text_rank < 3", code=2))
    assert "text_rank" in refused and "--marks" in refused
    marks = ("--marks", tmp_path / "dedup/marked")
    refused = one_line(capipe(*options, "--keep", "text_rank < 3", *marks, code=2))
    assert "text_rank" in refused and "--texts" in refused
    refused = one_line(capipe(*options, "--keep", "copies > 5", *marks, code=2))
    assert "copies is from 1.0 to 1.0" in refused
    capipe(*options, "--keep", "copies < 5", *marks)
    assert not (tmp_path / "out/scores").exists() and (tmp_path / "out/shards").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--per-text", 1], "--per-text 1"),
        (["--text-threshold", 0.9], "--text-threshold 0.9"),
        (["--texts", "--text-threshold", 0.3], "--text-threshold"),
        (["--texts", "--per-text", 0], "per-text"),
        (["--texts", "--captions", "x"], "only one kind of text"),
        (["--marks", "x"], "--marks"),
        (["--texts", "--marks", "x", "--radius", 3], "--radius"),
        (["--captions", "nowhere"], "nowhere"),
        (["--texts", "--marks", "nowhere"], "nowhere"),
    ],
)
def test_options_that_do_not_fit_are_refused(shards: Path, tmp_path: Path, options: list[object], says: str) -> None:
    refused = one_line(capipe("dedup", "--shards", shards, "--out", tmp_path / "out", *options, code=2))
    assert says.removeprefix("--") in refused and not (tmp_path / "out").exists()


def test_artifacts_that_do_not_fit_are_refused(shards: Path, tmp_path: Path) -> None:
    write_captions(shards, tmp_path / "captions", "a dog")
    other = shards_of(tmp_path / "other", odd=(1, 3))
    capipe("dedup", "--shards", other, "--out", tmp_path / "theirs")
    command = ["dedup", "--shards", shards, "--out", tmp_path / "out"]
    marks, captions = tmp_path / "theirs/marked", tmp_path / "captions"
    assert "'annotate'" in one_line(capipe(*command, "--texts", "--marks", captions, code=2))
    assert "'dedup'" in one_line(capipe(*command, "--captions", marks, code=2))
    refused = one_line(capipe(*command, "--captions", captions, "--marks", marks, code=2))
    assert "its rows are not those of" in refused and str(marks) in refused
    write_marks(shards, tmp_path / "poor", lambda index, row: {})
    refused = one_line(capipe(*command, "--captions", captions, "--marks", tmp_path / "poor", "--fresh", code=2))
    assert "poor/00000.parquet: column 'sha256' is missing" in refused
    assert not (tmp_path / "out/marked/00000.parquet").exists()


def test_without_rensa_texts_are_refused_with_the_fix(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/rensa.py").write_text("raise ImportError('No module named rensa')")
    path = os.pathsep.join([str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")])
    options = ["--shards", shards, "--out", tmp_path / "out", "--texts"]
    assert "pip install 'capipe[dedup]'" in one_line(capipe("dedup", *options, code=2, PYTHONPATH=path))


def test_other_captions_are_refused_until_fresh(shards: Path, tmp_path: Path) -> None:
    capipe("dedup", "--shards", shards, "--out", tmp_path / "images")
    write_captions(shards, tmp_path / "captions", "a photo of a thing")
    command = ["dedup", "--shards", shards, "--captions", tmp_path / "captions", "--marks", tmp_path / "images/marked"]
    capipe(*command, "--out", tmp_path / "out")
    before = {row["text_group"] for row in table(tmp_path / "out/marked")}
    shutil.rmtree(tmp_path / "captions")
    write_captions(shards, tmp_path / "captions", "another thing")
    assert "changed since this output was made" in one_line(capipe(*command, "--out", tmp_path / "out", code=2))
    assert {row["text_group"] for row in table(tmp_path / "out/marked")} == before
    capipe(*command, "--out", tmp_path / "out", "--fresh")
    after = {row["text_group"] for row in table(tmp_path / "out/marked")}
    assert len(after - {None}) == 1 and not after & before - {None}


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "in", [TEXTS[number % 2] for number in range(12)])
    command = [sys.executable, "-m", "capipe.pipeline", "dedup", "--shards", shards, "--texts", "--per-text", 2]
    command += ["--workers", 1]
    capipe(*command[3:], "--out", tmp_path / "alone")
    moments = run_killed(
        [*command, "--out", tmp_path / "killed"], tmp_path / "killed", committed(tmp_path / "alone"), 4, 3
    )
    assert len(moments) >= 3, "the runs were over too soon to be killed"
    for name in ("hashes", "images", "texts", "marked"):
        assert contents(tmp_path / "alone" / name) == contents(tmp_path / "killed" / name) != {}
        assert "clean" in capipe("verify", tmp_path / "killed" / name).stdout
    assert leftovers(tmp_path / "killed/marked") == leftovers(tmp_path / "killed/texts") == []
