"""`capipe annotate` as users run it: every row accounted for, whatever the input, the engine or the disk does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capipe.manifests.artifact import Artifact
from capipe.pipeline.inspect.verify import verify

from ...conftest import photo
from ..conftest import COMMAND, CaptionServer, capipe, one_line, table

MakeTar = Callable[..., Path]


@pytest.fixture
def shards(foreign_tars: Path) -> Path:
    return foreign_tars


def annotate(shards: object, out: Path, server: CaptionServer, *more: object, code: int = 0) -> str:
    options = ("--shards", shards, "--out", out, "--model", "m", "--engine", server.url, "--concurrency", 4)
    return capipe("annotate", *options, *more, code=code).stderr


def test_every_row_is_there_and_a_second_run_has_nothing_to_do(
    shards: Path, tmp_path: Path, server: CaptionServer
) -> None:
    out = tmp_path / "out"
    annotate(shards, out, server, "--prompt", "short", "--prompt", "dense")
    rows = table(out)
    assert len(rows) == 18 and len({row["key"] for row in rows}) == 18
    assert [row["status"] for row in rows] == (["ok"] * 4 + ["unsupported"] + ["ok"]) * 3
    assert all(len(row["captions"]) == 2 and row["text"].startswith("alt") for row in rows if row["status"] == "ok")
    assert verify(str(out)).faults == [] and server.requests == 30
    annotate(shards, out, server, "--prompt", "short", "--prompt", "dense")
    assert server.requests == 30


def test_another_configuration_is_refused_in_one_line_and_fresh_replaces_it(
    shards: Path, tmp_path: Path, server: CaptionServer
) -> None:
    out = tmp_path / "out"
    annotate(shards, out, server)
    before = table(out)
    done = capipe(
        *("annotate", "--shards", shards, "--out", out, "--model", "m", "--engine", server.url, "--temperature", 1),
        code=2,
    )
    assert "annotate.temperature: 0.0 -> 1.0" in one_line(done) and table(out) == before
    annotate(shards, out, server, "--temperature", 1, "--fresh")
    assert [row["key"] for row in table(out)] == [row["key"] for row in before]


@pytest.mark.parametrize(
    ("said", "option", "value", "key"),
    [
        ("The dog is looking at the camera. " * 5, "--loop-repeats", 6, "loop_repeats: 4 -> 6"),
        (
            "A banner that reads g" + "o" * 50 + "al, above a crowd of people at a football match.",
            "--longest-run",
            60,
            "",
        ),
    ],
)
def test_the_gates_thresholds_are_options_that_count_in_the_configuration(
    said: str, option: str, value: float, key: str, shards: Path, tmp_path: Path, server: CaptionServer
) -> None:
    out = tmp_path / "out"
    server.says = said
    annotate(shards, out, server, "--max-attempts", 1)
    assert {row["status"] for row in table(out)} == {"degenerate", "unsupported"}
    command = ("annotate", "--shards", shards, "--out", out, "--model", "m", "--engine", server.url)
    assert key in one_line(capipe(*command, "--max-attempts", 1, option, value, code=2))
    annotate(shards, out, server, "--max-attempts", 1, option, value, "--fresh")
    assert {row["status"] for row in table(out)} == {"ok", "unsupported"}
    assert option in one_line(capipe(*command, option, 0, code=2))


def test_a_caption_that_many_pictures_share_is_named(make_tar: MakeTar, tmp_path: Path, server: CaptionServer) -> None:
    path = make_tar({f"{i:03}.jpg": photo(i) for i in range(24)})
    server.says = "A beautiful picture."
    told = annotate(path, tmp_path / "out", server)
    assert "warning: one caption stands under 24 of 24 images: 'A beautiful picture.'; look whether" in told
    assert "warning" not in annotate(path, tmp_path / "out", server)  # nothing was done
    server.says = None
    assert "warning" not in annotate(path, tmp_path / "others", server)


def test_errors_of_a_server_cost_their_own_rows_and_retry_does_only_those(
    shards: Path, tmp_path: Path, server: CaptionServer
) -> None:
    broken = {photo(1), photo(12)}
    server.fails = lambda number, image: 400 if image in broken else 200
    out = tmp_path / "out"
    assert "2 rows ended in engine_error" in annotate(shards, out, server, code=1)
    rows = table(out)
    assert sum(row["status"] == "engine_error" for row in rows) == 2
    assert all("HTTP 400" in row["error"] for row in rows if row["status"] == "engine_error")
    assert server.requests == 15
    annotate(shards, out, server, code=1)  # committed shards are skipped, and still say so
    assert server.requests == 15
    server.fails = lambda number, image: 200
    annotate(shards, out, server, "--retry")
    assert server.requests == 17
    mended = table(out)
    assert [row for row in mended if row["error"] is None or "HTML" in row["error"]] == mended
    kept = [(a, b) for a, b in zip(rows, mended, strict=True) if a["status"] == "ok"]
    assert len(kept) == 13 and all(a == b for a, b in kept)
    assert verify(str(out)).faults == []


@pytest.mark.slow
def test_a_server_that_answers_500_or_never(make_tar: MakeTar, tmp_path: Path, server: CaptionServer) -> None:
    path = make_tar({f"{i}.jpg": photo(i) for i in range(3)})
    server.fails = lambda number, image: {photo(0): 500, photo(1): 0}.get(image, 200)
    annotate(path, tmp_path / "out", server, "--timeout", 0.5, code=1)
    errors = {row["key"]: row["error"] for row in table(tmp_path / "out")}
    assert "500" in errors["0"] and "Timeout" in errors["1"] and errors["2"] is None


@pytest.mark.slow
def test_a_server_that_dies_half_way_ends_the_run_and_the_next_one_finishes(
    shards: Path, tmp_path: Path, server: CaptionServer
) -> None:
    out = tmp_path / "out"

    def die(number: int, image: bytes) -> int:
        if number == 8:
            server.server.socket.close()  # refuses connections from now on
        return 200 if number < 8 else 500

    server.fails = die
    annotate(shards, out, server, code=1)
    done = sum(row["status"] == "ok" for row in table(out))
    assert done >= 4
    second = CaptionServer()
    try:
        annotate(shards, out, second, "--retry")
    finally:
        second.close()
    assert [row["status"] for row in table(out)] == (["ok"] * 4 + ["unsupported"] + ["ok"]) * 3
    assert second.requests == 15 - done and verify(str(out)).faults == []


def test_ctrl_c_finishes_what_is_in_the_engine_and_resumes(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    slow = server.fails

    def wait(number: int, image: bytes) -> int:
        time.sleep(0.3)  # under the server's lock: one request after the other
        return slow(number, image)

    server.fails = wait
    out = tmp_path / "out"
    options = ["annotate", "--shards", shards, "--out", out, "--model", "m", "--engine", server.url]
    process = subprocess.Popen(
        [*COMMAND, *map(str, options), "--concurrency", "1", "--decode-workers", "1"],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    while server.requests < 3:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command to go on" in stderr and "Traceback" not in stderr
    asked = server.requests
    assert asked < 15
    annotate(shards, out, server)
    assert server.requests == 15  # nothing was asked twice
    assert len(table(out)) == 18 and verify(str(out)).faults == []


def test_pack_copies_the_images_and_adds_the_captions(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    out = tmp_path / "out"
    annotate(shards, out, server, "--pack")
    assert verify(str(out)).faults == []
    with tarfile.open(out / "00001.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["000010000.jpg", "000010000.txt", "000010000.json"] and len(names) == 15
        assert tar.extractfile("000010000.jpg").read() == photo(10)  # type: ignore[union-attr]
        assert tar.extractfile("000010000.txt").read().startswith(b"caption of")  # type: ignore[union-attr]


def test_pack_keeps_the_metadata_of_the_source(make_tar: MakeTar, tmp_path: Path, server: CaptionServer) -> None:
    theirs = rb'{"uid": "mine", "half": "\ud800", "score": NaN, "width": 96}'
    make_tar({"a.jpg": photo(0), "a.json": theirs, "b.jpg": photo(1), "b.json": b"[" * 9000}, "in/00000.tar")
    annotate(tmp_path / "in", tmp_path / "out", server, "--pack")
    rows = table(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "ok"] and "json is nested too deeply" in rows[1]["error"]
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        meta = json.loads(tar.extractfile("a.json").read())  # type: ignore[union-attr]
    assert (meta["original_uid"], meta["uid"]) == ("mine", rows[0]["uid"])
    assert (meta["half"], meta["score"], meta["width"]) == ("?", None, 96)
    assert meta["captions"] == rows[0]["captions"]


def test_damaged_tars_are_rows(make_tar: MakeTar, tmp_path: Path, server: CaptionServer) -> None:
    whole = make_tar({f"{i}.jpg": photo(i) for i in range(4)}, "in/00000.tar")
    whole.write_bytes(whole.read_bytes()[: -(10240 + 600)])
    make_tar({"../x.jpg": photo(0), "y.jpg": photo(1)}, "in/00001.tar")
    (tmp_path / "in/00002.tar").write_bytes(os.urandom(5000))
    (tmp_path / "in/00003.tar").touch()
    annotate(tmp_path / "in", tmp_path / "out", server)
    statuses = [row["status"] for row in table(tmp_path / "out")]
    assert sorted(set(statuses)) == ["corrupt", "ok", "unsupported"]
    assert all(row["error"] for row in table(tmp_path / "out") if row["status"] != "ok")
    assert verify(str(tmp_path / "out")).faults == []


def test_a_shard_that_cannot_be_read_is_quarantined_and_the_rest_go_on(
    shards: Path, tmp_path: Path, server: CaptionServer
) -> None:
    held = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").unlink()
    (shards / "00001.tar").mkdir()  # opens like a file, reads like none, even for root
    stderr = annotate(f"{shards}/*.tar", tmp_path / "out", server, code=1)
    assert "00001" in stderr and sorted(Artifact.open(str(tmp_path / "out")).committed()) == ["00000", "00002"]
    assert "directory" in Artifact.open(str(tmp_path / "out")).quarantined()["00001"].lower()
    (shards / "00001.tar").rmdir()
    (shards / "00001.tar").write_bytes(held)
    annotate(f"{shards}/*.tar", tmp_path / "out", server)
    assert len(table(tmp_path / "out")) == 18


def test_an_input_that_changed_since_is_refused(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    annotate(shards, tmp_path / "out", server)
    with (shards / "00001.tar").open("ab") as file:
        file.write(bytes(1024))
    done = capipe(
        *("annotate", "--shards", shards, "--out", tmp_path / "out", "--model", "m", "--engine", server.url), code=2
    )
    assert "00001.tar: the shard changed" in one_line(done)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_harms_nothing(
    shards: Path, tmp_path: Path, server: CaptionServer, small_disk: Path
) -> None:
    out = small_disk / "out"
    annotate(f"{shards}/00000.tar", out, server)
    filler = small_disk / "filler"
    handle = os.open(filler, os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space"):
        while True:
            os.write(handle, b"x" * 4096)
    os.close(handle)
    done = capipe(
        *("annotate", "--shards", f"{shards}/*.tar", "--out", out, "--model", "m", "--engine", server.url), code=3
    )
    assert "no space left" in one_line(done)
    assert list(Artifact.open(str(out)).committed()) == ["00000"] and len(table(out)) == 6
    filler.unlink()
    annotate(f"{shards}/*.tar", out, server)
    assert len(table(out)) == 18 and verify(str(out)).faults == []


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--model", "tiny/nothing"], "tiny/captioner"),
        (["--model", "tiny/captioner", "--prompt", "nosuch"], "there are"),
        (["--model", "tiny/captioner", "--top-p", "0"], "--top-p"),
        (["--model", "m", "--engine", "http://127.0.0.1:9"], "no server answers"),
        (["--model", "m", "--engine", "gpt"], "--engine"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_writes_nothing(
    shards: Path, tmp_path: Path, options: list[str], word: str
) -> None:
    done = capipe("annotate", "--shards", shards, "--out", tmp_path / "out", *options, code=2)
    assert word in one_line(done) and not (tmp_path / "out").exists()


def test_a_missing_shard_of_a_range_is_named(shards: Path, tmp_path: Path) -> None:
    pattern = f"{shards}/{{00000..00005}}.tar"
    done = capipe("annotate", "--shards", pattern, "--out", tmp_path / "out", "--model", "tiny/captioner", code=2)
    assert "00003.tar" in one_line(done)
