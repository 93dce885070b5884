"""Rows that could not be read are tried again by the same command, and cost the others nothing; sources grow."""

from __future__ import annotations

import json
import os
import textwrap
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from capipe.errors import ArtifactMismatch
from capipe.manifests import replacing
from capipe.manifests.artifact import Artifact
from capipe.manifests.verify import verify

from ...conftest import photo
from ..ingesting import ingest, members, rows


def table(path: Path, named: list[str]) -> Path:
    path.write_text("".join(json.dumps({"path": name, "text": f"text of {name}"}) + "\n" for name in named))
    return path


def statuses(out: Path) -> list[str]:
    return [row["status"] for row in rows(out)]


def contents(out: Path) -> dict[str, bytes]:
    """What readers see of an artifact; stats hold times."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("0*")) if not path.name.endswith(".json")}


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A share with six pictures that is mounted; rename it to take it away."""
    root = tmp_path / "share"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.jpg").write_bytes(photo(number))
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_a_share_that_is_missing_and_then_there(share: Path, tmp_path: Path, workers: int) -> None:
    listed = table(tmp_path / "list.jsonl", [f"share/{number}.jpg" for number in range(6)])
    away, out = share.rename(tmp_path / "away"), tmp_path / "out"
    share.mkdir()
    (share / "3.jpg").write_bytes(photo(3))
    ingest(listed, out=out, shard_size=3, workers=workers)
    assert statuses(out) == ["read_error"] * 3 + ["ok", "read_error", "read_error"]
    assert {row["error"] for row in rows(out)} == {None, "cannot be read: No such file or directory"}
    assert verify(str(out)).faults == []
    before = contents(out)
    first = Artifact.open(str(out)).committed()["00001"]

    ingest(listed, out=out, shard_size=3, workers=workers)  # not yet: nothing is written
    assert contents(out) == before and Artifact.open(str(out)).committed()["00001"] == first

    (share / "3.jpg").unlink()  # what was read once is not read again
    for number in (4, 5):
        (share / f"{number}.jpg").write_bytes((away / f"{number}.jpg").read_bytes())
    (event, other) = sorted(
        ingest(listed, out=out, shard_size=3, workers=workers), key=lambda event: event.record.shard
    )
    assert event.record.rows == {"read_error": 3} and other.record.rows == {"ok": 3}
    assert {name: data for name, data in contents(out).items() if name.startswith("00000")} == {
        name: data for name, data in before.items() if name.startswith("00000")
    }
    for number in range(4):
        (share / f"{number}.jpg").write_bytes((away / f"{number}.jpg").read_bytes())
    ingest(listed, out=out, shard_size=3, workers=workers)
    ingest(listed, out=tmp_path / "alone", shard_size=3)
    assert contents(out) == contents(tmp_path / "alone")
    assert statuses(out) == ["ok"] * 6 and verify(str(out)).faults == []
    assert ingest(listed, out=out, shard_size=3) == []
    record = Artifact.open(str(out)).committed()["00001"]
    assert set(record.replaces) == {first.files[name]["sha256"] for name in ("00001.tar", "00001.parquet")}


def test_rows_are_mended_on_an_object_store(share: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIPE_CACHE", str(tmp_path / "cache"))
    listed = table(tmp_path / "list.jsonl", ["share/0.jpg", "later/1.jpg"])
    out = f"memory://{tmp_path.name}/out"
    ingest(listed, out=out)
    (tmp_path / "later").mkdir()
    (tmp_path / "later/1.jpg").write_bytes(photo(1))
    ingest(listed, out=out)
    artifact = Artifact.open(out)
    assert [row["status"] for row in artifact.read_rows("00000")] == ["ok", "ok"] and verify(out).faults == []
    assert len(artifact.committed()["00000"].replaces) == 2


def test_links_into_a_share_that_is_not_mounted(share: Path, tmp_path: Path) -> None:
    """The folder itself is read, so nothing but the link is known of such a file at first: no size, no sidecars."""
    root = tmp_path / "photos"
    root.mkdir()
    (share / "1.txt").write_text("its caption")
    for name in ("0.jpg", "1.jpg", "1.txt", "2.jpg"):
        (root / name).symlink_to(share / name)
    away, out = share.rename(tmp_path / "away"), tmp_path / "out"
    ingest(root, out=out, follow_links=True, shard_size=2)
    assert statuses(out) == ["read_error", "read_error", "read_error"]
    away.rename(share)
    (root / "2.jpg").unlink()  # a dead link that is taken away leaves its row, with a final status
    ingest(root, out=out, follow_links=True, shard_size=2)
    assert statuses(out) == ["ok", "ok", "missing"]
    assert [row["text"] for row in rows(out)] == [None, "its caption", None]
    assert ingest(root, out=out, follow_links=True, shard_size=2) == [] and verify(str(out)).faults == []


class _Server(BaseHTTPRequestHandler):
    """Answers each path with what ``answers`` holds for it: a status, or bytes."""

    answers: ClassVar[dict[str, int | bytes]] = {}
    length = True

    def do_GET(self) -> None:
        answer = self.answers[self.path]
        body = answer if isinstance(answer, bytes) else b"<html>busy</html>"
        self.send_response(200 if isinstance(answer, bytes) else answer)
        if self.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def test_a_busy_server_is_asked_again_and_one_that_has_nothing_is_not(server: str, tmp_path: Path) -> None:
    codes = {503: "read_error", 429: "read_error", 500: "read_error", 408: "read_error", 404: "missing", 403: "missing"}
    _Server.answers = {"/ok.jpg": photo(0), **{f"/{code}.jpg": code for code in codes}}
    listed = table(tmp_path / "list.jsonl", [f"{server}{path}" for path in _Server.answers])
    out = tmp_path / "out"
    ingest(listed, out=out)
    assert statuses(out) == ["ok", *codes.values()]
    for code, row in zip(codes, rows(out)[1:], strict=True):
        assert f"cannot be read: HTTP {code} " in row["error"]
    _Server.answers |= {f"/{code}.jpg": photo(code) for code in codes}
    ingest(listed, out=out)
    assert statuses(out) == ["ok", *["ok" if status == "read_error" else "missing" for status in codes.values()]]
    assert ingest(listed, out=out) == [] and verify(str(out)).faults == []


def test_a_server_that_is_down_or_tells_no_size(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Server.answers = {"/a.jpg": photo(0)}
    listed = table(tmp_path / "list.jsonl", [f"{server}/a.jpg", "http://127.0.0.1:1/b.jpg"])
    monkeypatch.setattr(_Server, "length", False)
    ingest(listed, out=tmp_path / "out")
    assert statuses(tmp_path / "out") == ["ok", "read_error"]
    assert "Cannot connect" in rows(tmp_path / "out")[1]["error"]


class _Kill(BaseException):
    """Stands for SIGKILL at the point where it is raised."""


@pytest.mark.parametrize("point", range(7))
def test_a_crash_while_a_shard_is_mended(
    share: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """Before, between and after the renames and the two lines: at no moment is a row that was read lost."""
    (share / "9.jpg").symlink_to(tmp_path / "later.jpg")
    out = tmp_path / "out"
    ingest(share, out=out, follow_links=True)
    assert statuses(out) == ["ok"] * 6 + ["read_error"]
    (tmp_path / "later.jpg").write_bytes(photo(9))
    ingest(share, out=tmp_path / "alone", follow_links=True)
    for number in range(6):  # by now what was read is in the artifact alone: of the same size, so it counts as the same
        (share / f"{number}.jpg").write_bytes(bytes(len(photo(number))))
    calls = 0

    def dying(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > point:
                raise _Kill
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, pytest.raises(_Kill):
        patch.setattr(replacing.manifest, "append", dying(replacing.manifest.append))
        patch.setattr(replacing.Folder, "publish", dying(replacing.Folder.publish))
        patch.setattr(replacing, "write_synced", dying(replacing.write_synced))
        ingest(share, out=out, follow_links=True)
    assert verify(str(out)).faults == []
    ingest(share, out=out, follow_links=True)
    assert contents(out) == contents(tmp_path / "alone") and verify(str(out)).faults == []
    assert statuses(out) == ["ok"] * 7 and not (out / "_capipe/redo").exists()


# --- decoders that die ------------------------------------------------------------------------------------------------

# Runs in worker processes, so it has to be a module that they can import.
KILLER = """
    import os, signal
    from pathlib import Path
    from capipe.models.images.decode import check as real

    def check(data, limits, encoding):
        for wish in Path(__file__).parent.glob("kill-*"):
            size, left = wish.read_text().split()
            if len(data) == int(size) and int(left) > 0:
                wish.write_text(f"{size} {int(left) - 1}")
                os.kill(os.getpid(), signal.SIGKILL)
        return real(data, limits, encoding)
"""


@pytest.fixture
def killer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, int], None]:
    """Have the decoder of some bytes killed so many times."""
    (tmp_path / "killing_check.py").write_text(textwrap.dedent(KILLER))
    (tmp_path / "sitecustomize.py").write_text(
        "import capipe.stages.ingest.image_check as target, killing_check\ntarget.check = killing_check.check\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))

    def wish(data: bytes, times: int) -> None:
        (tmp_path / f"kill-{len(data)}").write_text(f"{len(data)} {times}")

    return wish


@pytest.mark.parametrize(
    ("kills", "status"),
    [
        pytest.param(1, "ok", marks=pytest.mark.slow),
        pytest.param(2, "ok", marks=pytest.mark.slow),
        (3, "read_error"),
    ],
)
def test_a_decoder_that_is_killed_says_nothing_of_the_image(
    share: Path, tmp_path: Path, killer: Callable[[bytes, int], None], kills: int, status: str
) -> None:
    """Once with the whole worker; then alone, in a process of its own, twice: never `corrupt`, never the shard lost."""
    killer(photo(2), kills)
    ingest(share, out=tmp_path / "out", workers=1)
    assert statuses(tmp_path / "out") == ["ok", "ok", status, "ok", "ok", "ok"]
    if status != "ok":
        error = "cannot be decoded now, tried 2 times: the decoder died: it was killed by SIGKILL"
        assert rows(tmp_path / "out")[2]["error"] == error
    ingest(share, out=tmp_path / "out", workers=1)
    assert statuses(tmp_path / "out") == ["ok"] * 6 and verify(str(tmp_path / "out")).faults == []


# --- a source that grows ----------------------------------------------------------------------------------------------


def test_new_files_of_a_folder_begin_new_shards(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest(photos, out=out, shard_size=10)
    before = contents(out)
    for name in ("00a.jpg", "05a.jpg", "99.jpg", "sub/1.jpg"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(photo(len(name) + 40))
    (photos / "05a.txt").write_text("a new one")
    (event,) = ingest(photos, out=out, shard_size=10)
    assert event.record.shard == "00003" and event.record.rows == {"ok": 4}
    assert {name: contents(out)[name] for name in before} == before
    assert [Path(row["source"]).name for row in rows(out)[25:]] == ["00a.jpg", "05a.jpg", "99.jpg", "1.jpg"]
    assert rows(out)[26]["text"] == "a new one"
    assert ingest(photos, out=out, shard_size=10) == [] and verify(str(out)).faults == []
    assert Artifact.open(str(out)).config["run"]["shards_total"] == 4
    for number in range(60, 72):
        (photos / f"{number}.jpg").write_bytes(photo(number))
    assert [event.record.rows for event in ingest(photos, out=out, shard_size=10)] == [{"ok": 10}, {"ok": 2}]
    assert len({row["key"] for row in rows(out)}) == 41 and verify(str(out)).faults == []


@pytest.mark.parametrize("lost", ["00003", "00004", "00005"])
def test_growing_goes_on_after_a_kill(photos: Path, tmp_path: Path, lost: str) -> None:
    """Whichever of the new shards was not committed: it gets the items that it would have had."""
    ingest(photos, out=tmp_path / "out", shard_size=10)
    for number in range(25):
        (photos / f"{number:02d}b.jpg").write_bytes(photo(number + 40))
    ingest(photos, out=tmp_path / "out", shard_size=10)
    whole = contents(tmp_path / "out")
    artifact = Artifact.open(str(tmp_path / "out"))
    artifact.retract(artifact.committed()[lost])  # what its commit had not come to
    (event,) = ingest(photos, out=tmp_path / "out", shard_size=10)
    assert event.record.shard == lost and contents(tmp_path / "out") == whole
    assert verify(str(tmp_path / "out")).faults == []


def test_rows_at_the_end_of_a_table(share: Path, tmp_path: Path) -> None:
    listed = table(tmp_path / "list.jsonl", ["share/0.jpg", "share/1.jpg", "share/2.jpg"])
    ingest(listed, out=tmp_path / "out", shard_size=2)
    before = contents(tmp_path / "out")
    table(listed, [f"share/{number}.jpg" for number in range(6)])
    assert [event.record.shard for event in ingest(listed, out=tmp_path / "out", shard_size=2)] == ["00002", "00003"]
    assert {name: contents(tmp_path / "out")[name] for name in before} == before
    assert [row["text"] for row in rows(tmp_path / "out")] == [f"text of share/{number}.jpg" for number in range(6)]


def test_a_source_that_grew_and_lost_something_is_refused(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest(photos, out=out, shard_size=10)
    before = contents(out)
    (photos / "new.jpg").write_bytes(photo(77))
    (photos / "12.jpg").rename(photos / "renamed.jpg")
    with pytest.raises(ArtifactMismatch, match=r"other items now than when shard 00001 .*12\.jpg is gone, or another"):
        ingest(photos, out=out, shard_size=10)
    assert contents(out) == before


def test_growing_while_rows_wait_to_be_read(share: Path, tmp_path: Path) -> None:
    (share / "3x.jpg").symlink_to(tmp_path / "later.jpg")
    out = tmp_path / "out"
    ingest(share, out=out, follow_links=True, shard_size=4)
    assert statuses(out) == ["ok"] * 4 + ["read_error", "ok", "ok"]
    (tmp_path / "later.jpg").write_bytes(photo(9))
    (share / "0a.jpg").write_bytes(photo(8))
    ingest(share, out=out, follow_links=True, shard_size=4)
    assert statuses(out) == ["ok"] * 8 and verify(str(out)).faults == []
    assert [Path(row["source"]).name for row in rows(out)][4:] == ["3x.jpg", "4.jpg", "5.jpg", "0a.jpg"]
    assert len(members(out)) == 24
