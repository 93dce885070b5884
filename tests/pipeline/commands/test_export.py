"""`capipe export` as people run it: killed and resumed, given what it cannot use, after other commands."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import SCORE
from capipe.models.tiny.world.corpus import write_corpus
from capipe.pipeline.cli import main
from capipe.pipeline.inspect.verify import verify
from capipe.stages.export import formats

from ...stages.exporting import VERSIONED, captioned, export, final_shards, table_of
from ..conftest import COMMAND, capipe, one_line
from ..killing import run_killed

FORMATS = list(formats.FORMATS)


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file but the one that holds times, and the lock; a manifest's lines come in any order."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_file() or path.name in ("times.jsonl", "lock") or path.parent.name in VERSIONED:
            continue
        data = path.read_bytes()
        if path.name == "manifest.jsonl":
            data = b"".join(sorted(data.splitlines()))
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


SMALL = ["--shard-size", "3"]
QUICK = (("webdataset", []), ("parquet", []))  # one that copies tars, one that writes its own files


@pytest.mark.parametrize(
    ("format", "options", "shards"),
    [
        pytest.param(format, options, shards, marks=[] if (format, options) in QUICK else [pytest.mark.slow])
        for format, options, shards in [*((f, [], 12) for f in FORMATS), *((f, SMALL, 36) for f in FORMATS[:2])]
    ],
)
def test_killed_and_resumed_it_gives_the_same_bytes(
    tmp_path: Path, kills: Callable[[int], int], format: str, options: list[str], shards: int
) -> None:
    final_shards(tmp_path / "final", shards=12, rows=12, formats=("jpg", "png"))
    command = ["export", "final", "--format", format, *options, "--workers", "2", "--title", "Scenes", "--out"]
    subprocess.run([*COMMAND, *command, "alone"], cwd=tmp_path, check=True, capture_output=True)
    killed = tmp_path / "killed"
    assert run_killed([*COMMAND, *command, "killed"], killed, shards, kills=kills(3), seed=3, within=0.05, cwd=tmp_path)
    done = subprocess.run([*COMMAND, *command, "killed"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert f"{shards}/{shards} shards committed" in done.stdout
    assert contents(tmp_path / "killed") == contents(tmp_path / "alone")
    if format == "lance":
        assert table_of(tmp_path / "killed").equals(table_of(tmp_path / "alone"), check_metadata=True)
    assert verify(str(tmp_path / "killed")).faults == []


def test_ingested_shards_carry_their_original_captions(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 6, "heldout", 2)
    (tmp_path / "corpus/broken.jpg").write_bytes(b"<html>")
    capipe("ingest", tmp_path / "corpus", "--out", tmp_path / "shards", "--shard-size", 4)
    done = capipe("export", tmp_path / "shards", "--out", tmp_path / "out", "--format", "llava", "--language", "en")
    assert "2/2 shards committed, rows: 6 ok, 1 unsupported" in done.stdout
    card = (tmp_path / "out/README.md").read_text()
    assert "language:\n- en\n" in card and "license: other" in card and "### 1. ingest: shards" in card
    capipe("verify", tmp_path / "out")
    assert "2/2 shards" in capipe("status", tmp_path / "out").stdout


def test_a_bucket_takes_every_format(s3: str, tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    for format in FORMATS:
        out = f"{s3}/export-{format}"
        export(source, out, format)
        export(source, tmp_path / format, format)
        folder = Artifact.open(out).folder
        names = {name: mark for name, mark in contents(tmp_path / format).items() if "manifest" not in name}
        assert {n: hashlib.sha256(folder.read_bytes(n)).hexdigest() for n in names} == names
        assert verify(out).faults == []


def scores(folder: Path) -> Path:
    """An artifact without tars."""
    artifact = Artifact.create(str(folder), "score", {"a": 1}, {"shards_total": 1})
    with artifact.begin("00000", SCORE) as shard:
        shard.write({"key": "k", "uid": None, "status": "ok", "error": None})
        shard.commit(rows_in=1, input_info={"digest": "d"})
    artifact.close()
    return folder


def strangers(folder: Path) -> Path:
    folder.mkdir()
    (folder / "thesis.docx").write_bytes(b"x")
    return folder


def only_filtered(folder: Path) -> Path:
    return final_shards(folder, empty=(0, 1))


def incomplete(folder: Path) -> Path:
    return final_shards(folder, total=5)


def plain_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (scores, [], "an artifact of stage 'score' without tars (shard 00000); export what `filter`"),
        (incomplete, [], "2 of 5 shards are committed; run its stage (select) to the end first"),
        (only_filtered, [], "no row of it is ok, so there is nothing to export"),
        (plain_folder, [], "not an artifact of capipe"),
        (final_shards, ["--format", "tfrecord"], "--format tfrecord: unknown; one of webdataset, parquet, llava"),
        (final_shards, ["--license", "CC BY 4.0"], "--license 'CC BY 4.0': write the Hub's identifier"),
        (final_shards, ["--language", "English"], "--language 'English': write a code of two or three"),
        (final_shards, ["--image-extension", "gif"], "--image-extension gif: use auto, keep, or one of jpg"),
        (final_shards, ["--link", "--format", "llava"], "--link: only webdataset has tars"),
        (final_shards, ["--link", "--image-extension", "png"], "--link: tars are rewritten to name images alike"),
        (captioned, ["--out", "taken"], "taken: the folder holds other files (thesis.docx"),
        (final_shards, ["--out", "./final", "--fresh"], "./final: is what to read; choose another --out"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Any,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("final"))
    strangers(Path("taken"))
    out = [] if "--out" in options else ["--out", "out"]
    before = contents(tmp_path)
    monkeypatch.setattr(sys, "argv", ["capipe", "export", "final", *out, *options])
    with pytest.raises(SystemExit) as end:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and said in line, line
    assert contents(tmp_path) == before and not Path("out").exists()


def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    (source / "00000.tar").unlink()
    done = capipe("export", source, "--out", tmp_path / "out", "--workers", 1, "--image-extension", "jpg", code=1)
    assert "shard 00000 quarantined: FileNotFoundError" in done.stdout
    assert not (tmp_path / "out/README.md").exists()  # no card and no index of half a dataset
    again = final_shards(tmp_path / "again")
    (source / "00000.tar").write_bytes((again / "00000.tar").read_bytes())
    capipe("export", source, "--out", tmp_path / "out", "--image-extension", "jpg")
    assert verify(str(tmp_path / "out")).faults == []


def test_links_do_not_cross_file_systems(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    source, out = final_shards(tmp_path / "final"), elsewhere / f"capipe-export-{os.getpid()}"
    try:
        assert "different file systems" in one_line(capipe("export", source, "--out", out, "--link", code=2))
    finally:
        subprocess.run(["rm", "-rf", str(out)], check=True)


def test_the_listings_columns_are_all_there(tmp_path: Path) -> None:
    """A column that selection gains is exported without a change here."""
    source = final_shards(tmp_path / "final")
    capipe("export", source, "--out", tmp_path / "out", "--format", "parquet")
    schema = pq.read_schema(tmp_path / "out/data/00000.parquet")
    listed = pq.read_schema(source / "00000.parquet")
    assert set(listed.names) - set(schema.names) == {"status", "error"}
