"""`capipe dedup` as users run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from ..conftest import photo, tar_bytes
from ..stages.copies import copies
from .conftest import COMMAND, capipe, one_line, table


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


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an artifact that say nothing of when they were written, and its configuration's fingerprint."""
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}
    config = json.loads((folder / "_capipe/config.json").read_text())
    return {**found, "fingerprint": config["fingerprint"].encode()}


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
    assert "clean" in capipe("verify", out / "marked").stdout and "clean" in capipe("verify", out / "hashes").stdout


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


@pytest.mark.parametrize(
    ("content", "says"), [(None, "holds no image"), (b"damaged", "not one of 1 items can be decoded")]
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


@pytest.mark.slow
def test_killed_in_either_pass_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    pictures = [photo(seed, (96, 64)) for seed in range(100)]
    shards = shards_of(tmp_path / "in", [[pictures[(7 * s + k) % 100] for k in range(6)] for s in range(40)])
    reference = tmp_path / "bench"
    reference.mkdir()
    (reference / "a.jpg").write_bytes(copies(photo(5, (96, 64)))["jpeg q60"])
    options = ["dedup", "--shards", shards, "--against", reference, "--workers", 1, "--out"]
    capipe(*options, tmp_path / "alone")
    moments = [("hashes", 1), ("hashes", 17), ("against", 0), ("marked", 1), ("marked", 12), ("marked", 25)]
    killed = [kill(options, tmp_path / "killed", artifact, lines) for artifact, lines in moments]
    assert killed.count(True) >= 4, "the runs were over too soon to be killed"
    capipe(*options, tmp_path / "killed")
    for artifact in ("hashes", "against", "marked"):
        assert contents(tmp_path / "killed" / artifact) == contents(tmp_path / "alone" / artifact)
    assert "clean" in capipe("verify", tmp_path / "killed/marked").stdout
    statuses = {row["status"] for row in table(tmp_path / "alone/marked")}
    assert statuses == {"ok", "duplicate", "contaminated"}


def kill(options: list[Any], out: Path, artifact: str, lines: int) -> bool:
    """Start a run, kill it and its workers once ``artifact`` has more than so many shards; False if it had ended."""
    manifest = out / artifact / "_capipe/manifest.jsonl"
    command = [*COMMAND, *map(str, options), str(out)]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, start_new_session=True, stdout=quiet, stderr=quiet)
    while process.poll() is None and not (manifest.exists() and manifest.read_bytes().count(b"\n") > lines):
        time.sleep(0.002)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True
