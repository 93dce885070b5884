"""Ray's folders on a machine that others use, too: whose notes are believed, and where an own cluster lies."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from capipe.errors import BadInput
from capipe.pipeline.runners.ray import cluster as ray_runner
from capipe.pipeline.runners.ray import folders
from capipe.pipeline.runners.ray.cluster import ray_cluster
from capipe.pipeline.runners.ray.folders import (
    SOCKET_BYTES,
    listener_problem,
    listeners,
    note_problem,
    private_folder,
    read_note,
)

US, OTHER = 1000, 1001
FILE, FOLDER, LINK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK


def of(kind: int, mode: int = 0o644, uid: int = US, links: int = 1) -> os.stat_result:
    return os.stat_result((kind | mode, 1, 1, links, uid, uid, 20, 0, 0, 0))


@pytest.mark.parametrize(
    ("note", "folder", "said"),
    [
        (of(FILE), of(FOLDER, 0o777), None),  # as Ray makes it
        (of(FILE), of(FOLDER, 0o1777, 0), None),
        (of(FILE, uid=0), of(FOLDER, 0o755, 0), None),  # a cluster that the machine has for all
        (of(FILE, uid=OTHER), of(FOLDER, 0o777), "it belongs to another user (uid 1001)"),
        (of(FILE), of(FOLDER, 0o777, OTHER), "its folder belongs to another user (uid 1001)"),
        (of(FILE, 0o666), of(FOLDER), "others may write it (mode 666)"),
        (of(FILE, 0o664), of(FOLDER), "others may write it (mode 664)"),
        (of(FILE, links=2), of(FOLDER), "it has other names, too"),
        (of(stat.S_IFIFO), of(FOLDER), "a link or something else"),
        (of(FILE), of(LINK), "a link or something else"),
    ],
)
def test_whose_note_is_believed(note: os.stat_result, folder: os.stat_result, said: str | None) -> None:
    problem = note_problem(note, folder, US)
    assert problem is None if said is None else said in str(problem)


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray looks for a note, and a command, too."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray_runner._warn_ignored.cache_clear()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray").chmod(0o777)
    return tmp_path / "ray"


@pytest.fixture
def head() -> Iterator[socket.socket]:
    """What answers at an address; whom it has heard from, it can be asked."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        yield listening


def address_of(head: socket.socket) -> str:
    return f"127.0.0.1:{head.getsockname()[1]}"


def was_tried(head: socket.socket) -> bool:
    try:
        head.accept()[0].close()
    except TimeoutError:
        return False
    return True


def test_an_own_note_is_followed(ray: Path, head: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    (ray / "ray_current_cluster").write_text(address_of(head))
    assert read_note(ray) == (address_of(head), None)
    assert ray_cluster(None, None, False).address == address_of(head) and was_tried(head)
    assert capsys.readouterr().err == ""


def test_without_a_note_nothing_is_said(ray: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ray_cluster(None, None, False).address is None and capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["link", "folder", "hard link", "writable", "another user's", "pipe"])
def test_others_are_ignored_unasked(
    ray: Path, head: socket.socket, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note, elsewhere = ray / "ray_current_cluster", tmp_path / "elsewhere"
    elsewhere.write_text(address_of(head))
    if kind == "link":
        note.symlink_to(elsewhere)
    elif kind == "hard link":
        note.hardlink_to(elsewhere)
    elif kind == "folder":
        ray.rename(tmp_path / "real")
        (tmp_path / "real/ray_current_cluster").write_text(address_of(head))
        ray.symlink_to(tmp_path / "real")
    elif kind == "pipe":
        os.mkfifo(note)
    else:
        note.write_text(address_of(head))
        note.chmod(0o666 if kind == "writable" else 0o644)
        if kind == "another user's":
            if os.getuid() != 0:
                pytest.skip("only root can give files away")
            os.chown(note, OTHER, OTHER)
    assert ray_cluster(None, 2, False).address is None
    assert not was_tried(head)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(note) in line and "is ignored" in line and "--ray-address HOST:PORT" in line
    with pytest.raises(BadInput, match="--ray-address auto: its note is ignored, for "):
        ray_cluster("auto", None, False)
    assert ray_cluster(address_of(head), None, False).address == address_of(head)  # what is named is followed


def test_a_note_outlives_its_cluster(head: socket.socket) -> None:
    """Who listens at its port now is asked of the kernel."""
    port = head.getsockname()[1]
    line = "0: 0100007F:{:04X} 00000000:0000 {} 00000000:00000000 00:00000000 00000000 {} 0 5 1 0 100 0 0 10 0"
    table = ["sl local_address rem_address st ...", line.format(port, "0A", 1001), line.format(port, "01", 1002)]
    assert listeners(table, port) == {1001} and listeners(table, port + 1) == set()
    assert listener_problem(f"127.0.0.1:{port}", os.getuid()) is None
    if os.getuid() != 0:
        assert "listens at" in str(listener_problem(f"127.0.0.1:{port}", os.getuid() + 1))


def test_an_own_folder_is_private_and_has_room_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    before = os.umask(0)
    try:
        for place, parent in ((str(long), Path("/tmp")), ("/nowhere", Path("/tmp")), ("/tmp", Path("/tmp"))):
            monkeypatch.setenv("RAY_TMPDIR", place)
            monkeypatch.setattr(folders.tempfile, "tempdir", place)
            folder = private_folder()
            try:
                found = folder.stat()
                assert folder.parent == parent and stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.getuid()
                assert len(str(folder)) + len(folders._SOCKET) - len("/ray-12345678") <= SOCKET_BYTES
            finally:
                folder.rmdir()
    finally:
        os.umask(before)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runner, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"^--runner ray: Ray is not installed; pip install 'capipe\[ray\]'$"):
        ray_cluster(None, None, False)
