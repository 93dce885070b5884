"""Ray's files in shared temporary folders: when to trust the note of a running cluster, and a private session folder.

Ray's folder in the temporary folder is world-writable. The author of a note there chooses the machine to which a run
sends its code, paths and keys; a writer in a cluster's folder can replace files that its workers read.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ...errors import BadInput

CONNECT_SECONDS = 5.0
MAX_NOTE_BYTES = 512
SOCKET_BYTES = 107  # of the path of a Unix socket
_SOCKET = "/ray-12345678/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.12"  # of Ray's, the longest
_LISTENING = "0A"  # in /proc/net/tcp


def read_note(folder: Path) -> tuple[str | None, str | None]:
    """The address in the note of the cluster that `ray start` began here, or why the note that is there is ignored."""
    note = folder / "ray_current_cluster"
    try:
        handle = os.open(note, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None, None
    except OSError:
        return None, f"{note} is a symbolic link, or cannot be read"
    with os.fdopen(handle, "rb") as file:
        problem = note_problem(os.fstat(handle), folder.lstat(), os.getuid())
        if problem is not None:
            return None, f"{note}: {problem}"
        address = file.read(MAX_NOTE_BYTES).decode("ascii", "replace").strip()
    problem = listener_problem(address, os.getuid())
    return (address, None) if problem is None else (None, f"{note}: {problem}")


def note_problem(note: os.stat_result, folder: os.stat_result, uid: int) -> str | None:
    """Why a note is not trusted, by the status of the opened file and of its folder (links not followed).

    Ray makes its folder world-writable: others can remove a note there, but cannot make theirs the user's.
    """
    if not stat.S_ISREG(note.st_mode) or not stat.S_ISDIR(folder.st_mode):
        return "no file in a folder, but a link or something else"
    for what, status in (("it", note), ("its folder", folder)):
        if status.st_uid not in (uid, 0):
            return f"{what} belongs to another user (uid {status.st_uid})"
    if note.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write it (mode {stat.S_IMODE(note.st_mode):o})"
    return "it has other names, too (hard links)" if note.st_nlink > 1 else None


def address_problem(address: str) -> str | None:
    """Why no head can be reached at an address, in a few words."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return "not HOST:PORT of a Ray head"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        return f"no Ray head answers there ({error})"
    return None


def listener_problem(address: str, uid: int) -> str | None:
    """Whether another user listens at an address of this machine: a note outlives its cluster, which frees the port."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return None
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as connection:
            if connection.getpeername()[0] != connection.getsockname()[0]:
                return None
        lines = [line for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    except (OSError, OverflowError):
        return None
    others = sorted(listeners(lines, int(port)) - {uid, 0})
    return f"another user (uid {others[0]}) listens at {address}" if others else None


def listeners(lines: Iterable[str], port: int) -> set[int]:
    """Uids of the listeners at a port, by lines of ``/proc/net/tcp``."""
    rows = (line.split() for line in lines)
    return {int(row[7]) for row in rows if row[3:4] == [_LISTENING] and int(row[1].rpartition(":")[2], 16) == port}


def private_folder() -> Path:
    """A new folder of this user alone, in $RAY_TMPDIR or the temporary folder, with a path short enough for Ray's
    sockets. Ray gets ``r`` in it, since it makes its own folder world-writable.

    Not in $XDG_RUNTIME_DIR, which is removed at logout. Raises BadInput.
    """
    room = SOCKET_BYTES - len(_SOCKET)
    folders = [folder for folder in (os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp") if folder]
    for folder in folders:
        if len(os.fsencode(Path(folder).absolute())) <= room:
            try:
                return Path(tempfile.mkdtemp(prefix="ray-", dir=Path(folder).absolute()))
            except OSError:
                continue
    text = (
        f"--runner ray: no folder for a cluster ({', '.join(folders)}: missing, not writable or over {room} bytes long"
    )
    raise BadInput(f"{text}, with which Ray's sockets have no room); set RAY_TMPDIR")
