"""Ray's files in shared temporary folders: checks of a running cluster's address note, and a private session folder.

Ray's folder in the temporary folder is world-writable. The author of a note there chooses the machine that receives a
run's code, paths and keys; a user who can write to a cluster's folder can replace files that its workers read.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ....errors import BadInput

CONNECT_SECONDS = 5.0
MAX_NOTE_BYTES = 512
SOCKET_BYTES = 107  # longest path of a Unix socket
_SOCKET = "/ray-12345678/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.12"  # Ray's longest
_LISTENING = "0A"  # in /proc/net/tcp


def read_note(folder: Path) -> tuple[str | None, str | None]:
    """Address in the note of a cluster started by `ray start` here, or the reason for ignoring the note."""
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
    """Reason not to trust a note, from the status of the opened file and of its folder (links not followed).

    Ray makes its folder world-writable: other users can remove a note there, but cannot create one owned by the user.
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
    """Reason that no head can be reached at an address, in a few words."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return "not HOST:PORT of a Ray head"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        return f"no Ray head answers there ({error})"
    return None


def listener_problem(address: str, uid: int) -> str | None:
    """Warning if another user listens at a local address: a note outlives its cluster, whose port is then free."""
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
    """Uids of the listeners at a port, from lines of ``/proc/net/tcp``."""
    rows = (line.split() for line in lines)
    return {int(row[7]) for row in rows if row[3:4] == [_LISTENING] and int(row[1].rpartition(":")[2], 16) == port}


def private_folder() -> Path:
    """Create a folder private to this user, in $RAY_TMPDIR or the temporary folder, with a path short enough for Ray's
    sockets. Ray gets the subfolder ``r``, since it makes its own folder world-writable.

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
