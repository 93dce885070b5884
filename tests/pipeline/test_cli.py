"""The commands around annotate: demo, ingest, verify, status, doctor."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from capipe.models.bundled import NAMES, folder_of
from capipe.models.tiny.train.bundle import VISION_FILE
from capipe.pipeline.commands.doctor import _models

from ..conftest import photo
from .conftest import capipe, one_line, table


def test_ingest_accounts_for_every_file(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    files = {
        "a.jpg": photo(0),
        "a.txt": b"alt",
        "b.png": photo(1, fmt="PNG"),
        "c.jpg": photo(2)[:400],
        "d.jpg": b"<html></html>",
        "e.jpg": b"",
        "notes.md": b"# notes",
        "f.webp": photo(3, fmt="WEBP"),
    }
    for name, data in files.items():
        (source / name).write_bytes(data)
    capipe("ingest", source, "--out", tmp_path / "out", "--shard-size", 3)
    rows = table(tmp_path / "out")
    assert {Path(row["source"]).name: row["status"] for row in rows} == {
        "a.jpg": "ok",
        "b.png": "ok",
        "c.jpg": "corrupt",
        "d.jpg": "unsupported",
        "e.jpg": "corrupt",
        "f.webp": "ok",
        "notes.md": "unsupported",
    }
    assert [row["key"] for row in rows] == ["000000", "000001", "000002", "000010", "000011", "000012", "000020"]
    again = capipe("ingest", source, "--out", tmp_path / "out", "--shard-size", 3)
    assert "3/3 shards" in again.stdout
    refused = capipe("ingest", source, "--out", tmp_path / "out", "--shard-size", 4, code=2)
    assert "shard_size: 3 -> 4" in one_line(refused)


def test_ingest_opens_what_it_may(tmp_path: Path) -> None:
    """A table and a folder from elsewhere, and the options that let them lead less and more far."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/private.jpg").write_bytes(photo(0))
    (tmp_path / "list").mkdir()
    (tmp_path / "list/a.jpg").write_bytes(photo(1))
    os.mkfifo(tmp_path / "list/pipe")
    said = [
        "a.jpg",
        "pipe",
        "/dev/zero",
        "../home/private.jpg",
        "reference://k::x.json",
        "http://169.254.169.254/x.jpg",
    ]
    (tmp_path / "list/t.csv").write_text("\n".join(["path", *said]) + "\n")
    capipe("ingest", tmp_path / "list/t.csv", "--out", tmp_path / "free", limit_s=60)
    bad = "unsupported"
    assert [row["status"] for row in table(tmp_path / "free")] == ["ok", bad, bad, "ok", bad, bad]
    capipe(
        "ingest", tmp_path / "list/t.csv", "--out", tmp_path / "bound", "--within", tmp_path / "list", "--public-only"
    )
    assert [row["status"] for row in table(tmp_path / "bound")] == ["ok", *[bad] * 5]
    refused = capipe("ingest", tmp_path / "list/t.csv", "--out", tmp_path / "bound", code=2)
    assert "within" in one_line(refused) and "public_only" in one_line(refused)
    missing = capipe("ingest", tmp_path / "list/t.csv", "--out", tmp_path / "no", "--within", tmp_path / "no", code=2)
    assert "no such folder" in one_line(missing)
    (tmp_path / "split").mkdir()
    (tmp_path / "split/p.jpg").symlink_to(tmp_path / "home/private.jpg")
    links = capipe("ingest", tmp_path / "split", "--out", tmp_path / "links", code=2)
    assert "--follow-links takes" in one_line(links)
    capipe("ingest", tmp_path / "split", "--out", tmp_path / "links", "--follow-links")
    assert [row["status"] for row in table(tmp_path / "links")] == ["ok"]


def test_ingest_takes_further_formats_where_it_is_told_to(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "a.bmp").write_bytes(photo(0, fmt="BMP"))
    capipe("ingest", source, "--out", tmp_path / "plain")
    capipe("ingest", source, "--out", tmp_path / "out", "--accept", "bmp,gif", "--transcode", "png")
    (plain,), (row,) = table(tmp_path / "plain"), table(tmp_path / "out")
    assert plain["status"] == "unsupported" and plain["error"].endswith("a BMP image; --accept bmp takes it")
    assert (row["status"], row["format"], row["original_format"], row["error"]) == ("ok", "png", "bmp", None)
    refused = capipe("ingest", source, "--out", tmp_path / "out", code=2)
    assert "transcode: " in one_line(refused)
    replaced = capipe("ingest", source, "--out", tmp_path / "new", "--convert", code=2)
    assert "--accept all --transcode png" in one_line(replaced)
    for options, reason in (
        (["--accept", "tga"], "--accept tga: unknown; one of avif"),
        (["--transcode", "png"], "it names none"),
        (["--accept", "gif", "--transcode", "gif"], "--transcode: "),
        (["--accept", "gif", "--quality", "90"], "--quality: of --transcode"),
    ):
        assert reason in one_line(capipe("ingest", source, "--out", tmp_path / "new", *options, code=2))
    assert not (tmp_path / "new").exists()


def test_ingest_ends_with_1_until_every_row_could_be_read(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\nshare/a.jpg\nshare/b.jpg\n")
    (tmp_path / "share").mkdir()
    (tmp_path / "share/a.jpg").write_bytes(photo(0))
    for _ in range(2):
        first = capipe("ingest", tmp_path / "list.csv", "--out", tmp_path / "out", code=1)
        assert "1 rows ended in read_error (the first: cannot be read: No such file" in first.stderr
        assert "run the same command" in first.stderr
        state = json.loads(capipe("status", tmp_path / "out", "--json").stdout)
        assert (state["rows"], state["unresolved"], state["complete"]) == ({"ok": 1, "read_error": 1}, 1, False)
    (tmp_path / "share/b.jpg").write_bytes(photo(1))
    capipe("ingest", tmp_path / "list.csv", "--out", tmp_path / "out")
    assert [row["status"] for row in table(tmp_path / "out")] == ["ok", "ok"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    source, out = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9", b"sh\xe4rds"))
    source.mkdir()
    (source / "a.jpg").write_bytes(photo(0))
    for _ in range(2):
        capipe("ingest", source, "--out", out)
        capipe("dedup", "--shards", out, "--out", tmp_path / "marks")
    assert "clean" in capipe("verify", out).stdout and "clean" in capipe("verify", tmp_path / "marks/marked").stdout
    assert "caf" in one_line(capipe("ingest", tmp_path / os.fsdecode(b"caf\xe8"), "--out", tmp_path / "no", code=2))


def test_status_and_verify(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.jpg").write_bytes(photo(0))
    capipe("ingest", tmp_path / "src", "--out", tmp_path / "out")
    state = json.loads(capipe("status", tmp_path / "out", "--json").stdout)
    assert (state["stage"], state["shards"], state["rows"], state["complete"]) == ("ingest", 1, {"ok": 1}, True)
    assert "clean" in capipe("verify", tmp_path / "out").stdout
    (tmp_path / "out/00000.tar").write_bytes(b"x")
    assert "00000.tar: 1 bytes" in capipe("verify", tmp_path / "out", code=1).stdout
    assert "not an artifact" in one_line(capipe("verify", tmp_path / "src", code=2))
    assert "not an artifact" in one_line(capipe("status", tmp_path / "nowhere", code=2))


def test_doctor_finds_the_engines() -> None:
    output = capipe("doctor").stdout
    for name in ("torch", "engine transformers", "engine vllm", "tiny/captioner", "cores"):
        assert name in output
    assert "MISSING" not in output


def test_doctor_names_bundled_models_that_lack_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a checkout without symbolic links has them: the path as text instead of the file."""
    for name in {*NAMES} - {"teacher", "clip"}:
        (tmp_path / name).symlink_to(folder_of(name))
    shutil.copytree(folder_of("teacher"), tmp_path / "teacher")
    (tmp_path / "teacher" / VISION_FILE).write_text(f"../captioner/{VISION_FILE}")
    monkeypatch.setattr("capipe.models.bundled.folder_of", lambda name: tmp_path / name)
    found = {check.name: check for check in _models()}
    assert found["tiny/captioner"].found == "6.1 MB" and found.keys() == {"tiny/captioner", "tiny/teacher", "tiny/clip"}
    assert "symbolic links" in str(found["tiny/teacher"].mend)


def wds_names(folder: Path) -> list[str]:
    """The captions in a folder's tars."""
    return [name for tar in folder.glob("*.tar") for name in tarfile.open(tar).getnames() if name.endswith(".txt")]


def test_a_demo_without_training_ends_with_shards(tmp_path: Path) -> None:
    small = ("--images", 3, "--engine", "transformers", "--train-steps", 0)
    lines = capipe("demo", "--out", tmp_path / "demo", *small, limit_s=600).stdout.strip().splitlines()
    at = tmp_path / "demo"
    assert lines[-3:] == [f"report: {at}/report.html", f"card: {at}/final/README.md", f"shards: {at}/final"]
    left = re.match(r"filter: (\d+) of 3 rows kept \(", lines[-4])
    assert left is not None and int(left[1]) == len(wds_names(at / "final")) > 0


@pytest.mark.slow
def test_demo_ends_with_captions_report_and_shards(tmp_path: Path) -> None:
    small = ("--out", tmp_path / "demo", "--images", 12, "--engine", "transformers", "--train-steps")
    lines = capipe("demo", *small, 1, limit_s=600).stdout.strip().splitlines()
    at = tmp_path / "demo"
    assert lines[-3:] == [f"report: {at}/report.html", f"card: {at}/final/README.md", f"shards: {at}/final"]
    left = re.match(r"filter: (\d+) of 12 rows kept \(", lines[-4])
    assert left is not None and int(left[1]) == len(wds_names(at / "final")) > 0
    assert (at / "final/README.md").is_file() and (at / "filtered/shards/_capipe/report.html").is_file()
    gained = re.fullmatch(r"training: quiz accuracy (\S+) -> (\S+) in 1 steps \(oracle captions (\S+)\)", lines[-5])
    told = [re.fullmatch(r"  pictures/000000\.jpg (before|after): (.+)", line) for line in lines[-7:-5]]
    assert [each and each[1] for each in told] == ["before", "after"]
    assert all(line.startswith("  pictures/") for line in lines[-12:-9])
    kept = re.match(r"(\d+) of (\d+) questions kept, e\.g\. ", lines[-9])
    assert kept is not None and 0 < int(kept[1]) <= int(kept[2])
    accuracies = dict(re.findall(r"([\w-]+) (\d\.\d\d)", lines[-8].removeprefix("quiz accuracy: ")))
    assert gained is not None and (gained[1], gained[3]) == (accuracies["plain"], accuracies["oracle"])
    report = (tmp_path / "demo/report.html").read_text()
    assert all(
        shown in report for shown in ("eval: plain", "eval-trained: plain", "data:image/", "tiny/holdout-reader")
    )
    assert "<script" not in report
    assert float(accuracies["oracle"]) > float(accuracies["plain"]) and float(accuracies["empty"]) < 0.2
    assert "Captions before and after training" in report and report.count("After (step-000001): ") > 0
    captions = table(at / "captions")
    assert {row["status"] for row in captions} == {"ok"}
    models = {caption["model"].rpartition("/")[2] for row in captions for caption in row["captions"]}
    assert models == {"step-000001"}
    assert {row["uid"]: row["re_caption"] for row in table(at / "filtered/shards")} == {
        row["uid"]: row["captions"][0]["text"] for row in captions
    }
    assert lines[-12].endswith(f": {captions[0]['captions'][0]['text']}")
    again = capipe("demo", *small, 1, limit_s=600)
    assert again.stderr.count("done before") == 13 and again.stdout.strip().splitlines()[-12:] == lines[-12:]
    untrained = capipe("demo", *small, 0, limit_s=600)
    assert untrained.stderr.count("done before") == 5 and "training" not in untrained.stdout
    models = {caption["model"] for row in table(at / "captions") for caption in row["captions"]}
    assert models == {"tiny/captioner"}
    refused = capipe("demo", *small, 0, "--engine", "none", code=2).stderr
    assert "tiny.yaml: stages.captions.config: --engine 'none' is none of auto" in refused
    (tmp_path / "other/pictures").mkdir(parents=True)
    (tmp_path / "other/pictures/mine").touch()
    assert "this chain did not make" in one_line(capipe("demo", "--out", tmp_path / "other", code=2))
    assert [path.name for path in (tmp_path / "other/pictures").iterdir()] == ["mine"]
