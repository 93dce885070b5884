"""`capipe dedup` as users run it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from capipe.manifests.artifact import Artifact

from ...conftest import photo, tar_bytes
from ...stages.copies import copies
from ...stages.embedded import embed
from ..conftest import capipe, one_line, table
from ..dedup_crash import crash_trial


def shards_of(folder: Path, per_shard: list[list[bytes]]) -> Path:
    folder.mkdir()
    for number, images in enumerate(per_shard):
        members = {f"{number:05}{index:04}.jpg": data for index, data in enumerate(images)}
        (folder / f"{number:05}.tar").write_bytes(tar_bytes(members))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards: pictures 1 to 4, copies of the first and the second of them, and what is no picture."""
    one, two, three, four = (photo(seed, (320, 240)) for seed in range(1, 5))
    half = [copies(one)["jpeg q60"], copies(two)["cropped 4 %"], one, b"<html>no picture</html>"]
    return shards_of(tmp_path / "in", [[one, two, three], [four, *half]])


def test_marks_and_a_second_run_that_does_nothing(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    capipe("dedup", "--shards", shards, "--out", out)
    rows = {row["key"]: row for row in table(out / "marked")}
    assert [rows[key]["status"] for key in sorted(rows)] == ["ok"] * 4 + ["duplicate"] * 3 + ["unsupported"]
    assert rows["000010003"]["duplicate_of"] == "000000000" and rows["000010003"]["copies"] == 2
    assert rows["000010002"]["group"] == rows["000000001"]["uid"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = capipe("dedup", "--shards", shards, "--out", out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert "dedup: 0 images" in again.stderr and "8 images" not in again.stderr
    for artifact in ("hashes", "marked"):
        assert "clean" in capipe("verify", out / artifact).stdout
        assert "2/2 shards committed" in capipe("status", out / artifact).stdout


def test_another_radius_hashes_nothing_again(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    capipe("dedup", "--shards", shards, "--out", out)
    before = {path: path.stat().st_mtime_ns for path in (out / "hashes").rglob("*") if path.is_file()}
    refused = capipe("dedup", "--shards", shards, "--out", out, "--radius", 0, code=2)
    assert "dedup.radius: 7 -> 0" in one_line(refused) and "--fresh" in one_line(refused)
    capipe("dedup", "--shards", shards, "--out", out, "--radius", 0, "--fresh")
    assert before == {path: path.stat().st_mtime_ns for path in (out / "hashes").rglob("*") if path.is_file()}


def test_what_a_reference_set_holds_is_contaminated(shards: Path, tmp_path: Path) -> None:
    folder, tars = tmp_path / "bench", tmp_path / "tars"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(photo(3, (320, 240)))  # the very file
    (folder / "b.jpg").write_bytes(b"damaged")
    shards_of(tars, [[copies(photo(2, (320, 240)))["brighter by 15 %"]]])
    out = tmp_path / "out"
    capipe("dedup", "--shards", shards, "--out", out, "--against", folder, "--against", tars)
    rows = {row["key"]: row for row in table(out / "marked")}
    assert rows["000000002"]["status"] == "contaminated" and rows["000000002"]["matched"] == str(folder / "a.jpg")
    assert rows["000000001"]["status"] == "contaminated" and str(tars) in rows["000000001"]["matched"]
    assert rows["000010002"]["matched"] == rows["000000001"]["matched"]  # a cropped copy of that
    assert sum(row["status"] == "contaminated" for row in rows.values()) == 3
    assert rows["000000000"]["status"] == "ok" and rows["000000000"]["matched"] is None
    assert "clean" in capipe("verify", out / "against").stdout
    assert "1/1 shards committed" in capipe("status", out / "against").stdout


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "holds no image"),
        (b"notes", "holds no image: plain text"),
        (b"\xff\xd8\xffdamaged", "not one of 1 items can be decoded"),
    ],
)
def test_a_reference_set_without_images_is_refused(
    shards: Path, tmp_path: Path, content: bytes | None, says: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    if content is not None:
        (empty / "a.jpg").write_bytes(content)
    refused = capipe("dedup", "--shards", shards, "--out", tmp_path / "out", "--against", empty, code=2)
    assert str(empty) in one_line(refused) and says in one_line(refused)
    assert not (tmp_path / "out/marked").exists()


@pytest.mark.parametrize("option", [("--radius", 16), ("--placeholder", 0)])
def test_options_out_of_range_are_refused(shards: Path, tmp_path: Path, option: tuple[str, int]) -> None:
    assert option[0] in one_line(capipe("dedup", "--shards", shards, "--out", tmp_path / "out", *option, code=2))
    assert not (tmp_path / "out").exists()


def test_a_changed_shard_is_noticed(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    capipe("dedup", "--shards", shards, "--out", out)
    (shards / "00001.tar").write_bytes(tar_bytes({"x.jpg": photo(9, (640, 480))}))
    assert "00001.tar" in one_line(capipe("dedup", "--shards", shards, "--out", out, code=2))
    capipe("dedup", "--shards", shards, "--out", out, "--fresh")
    assert [row["key"] for row in table(out / "marked")][3:] == ["x"]


def test_embeddings_group_what_hashes_do_not(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the extra 'dedup' is not installed")
    capipe("dedup", "--shards", shards, "--out", tmp_path / "plain")
    hashes = Artifact.open(str(tmp_path / "plain/hashes"))
    axes = {
        row["key"]: [float(n == index) for n in range(8)] for index, row in enumerate(table(tmp_path / "plain/hashes"))
    }
    near = {**axes, "000010000": axes["000000002"], "000010002": [float("nan")] * 8}  # the fourth picture as the third
    embed(tmp_path / "near", hashes, near, 8)
    embed(tmp_path / "far", hashes, axes, 8)
    out = tmp_path / "out"
    options = ["dedup", "--shards", shards, "--out", out, "--embeddings"]
    said = capipe(*options, tmp_path / "near")
    rows = {row["key"]: row for row in table(out / "marked")}
    assert rows["000000002"]["group"] == rows["000010000"]["group"]
    assert {rows[key]["status"] for key in ("000000002", "000010000")} == {"ok", "duplicate"}
    assert "1 images have no usable embedding" in said.stderr
    assert "cosine: null -> 0.9" in one_line(
        capipe(
            "dedup",
            "--shards",
            shards,
            "--out",
            tmp_path / "plain",
            "--embeddings",
            tmp_path / "near",
            "--cosine",
            0.9,
            code=2,
        )
    )
    refused = one_line(capipe(*options, tmp_path / "far", code=2))
    assert str(tmp_path / "far") in refused and "changed since this output was made" in refused
    capipe(*options, tmp_path / "far", "--fresh")
    rows = {row["key"]: row for row in table(out / "marked")}
    assert rows["000000002"]["group"] != rows["000010000"]["group"]
    strange = embed(tmp_path / "strange", hashes, axes, 8, uid=lambda uid: uid[::-1] if uid else None)
    refused = one_line(capipe(*options, strange.url, "--fresh", code=2))
    assert str(tmp_path / "strange") in refused and "it was not made of these shards" in refused


def test_embeddings_that_are_none_are_refused(shards: Path, tmp_path: Path) -> None:
    options = ["dedup", "--shards", shards, "--out", tmp_path / "out"]
    assert "--embeddings" in one_line(capipe(*options, "--cosine", 0.9, code=2))
    pytest.importorskip("faiss", reason="the extra 'dedup' is not installed")
    assert "not an artifact" in one_line(capipe(*options, "--embeddings", tmp_path, code=2))
    assert "--cosine" in one_line(capipe(*options, "--embeddings", tmp_path, "--cosine", 0.2, code=2))
    assert not (tmp_path / "out").exists()


def test_without_faiss_embeddings_are_refused_with_the_mend(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/faiss.py").write_text("raise ImportError('No module named faiss')")
    path = os.pathsep.join([str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")])
    options = ["--shards", shards, "--out", tmp_path / "out", "--embeddings", tmp_path]
    assert "pip install 'capipe[dedup]'" in one_line(capipe("dedup", *options, code=2, PYTHONPATH=path))


def test_a_reference_folder_that_does_not_exist(shards: Path, tmp_path: Path) -> None:
    refused = capipe("dedup", "--shards", shards, "--out", tmp_path / "out", "--against", tmp_path / "gone", code=2)
    assert str(tmp_path / "gone") in one_line(refused) and not (tmp_path / "out").exists()


def test_marks_of_another_input_are_refused(shards: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "shards"
    capipe("dedup", "--shards", shards, "--out", out)
    capipe("ingest", shards, "--out", other, "--shard-size", 4)
    refused = one_line(capipe("dedup", "--shards", other, "--out", out, code=2))
    assert "made by another configuration (input: null -> " in refused and "--fresh" in refused


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    trial = crash_trial(tmp_path, kills=4, shards=30, images=8, seed=3)
    assert trial.kills >= 3, "the runs were over too soon to be killed"
    assert trial.equal and trial.faults == [] and trial.leftovers == []
    assert set(trial.statuses) == {"ok", "duplicate", "contaminated"}
