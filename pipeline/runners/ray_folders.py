"""What Ray leaves in folders that others share: whose note of a running cluster is believed, and a folder of our own.

Ray's folder in the temporary one can be written by everybody. Who can put a note there names the machine that a run
sends its code, paths and keys to; who can write a cluster's folder can replace what its workers read.
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
    """Why a note is not believed, by what is known of the opened file and its folder (links not followed).

    Ray makes its folder writable to everybody: others can remove a note there, but none of theirs becomes the user's.
    """
    if not stat.S_ISREG(note.st_mode) or not stat.S_ISDIR(folder.st_mode):
        return "no file in a folder, but a link or something else"
    for what, found in (("it", note), ("its folder", folder)):
        if found.st_uid not in (uid, 0):
            return f"{what} belongs to another user (uid {found.st_uid})"
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
    """Whether at an address of this machine another user listens: a note outlives its cluster, whose port is free."""
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
    """The users that listen at a port, by lines of ``/proc/net/tcp``."""
    rows = (line.split() for line in lines)
    return {int(row[7]) for row in rows if row[3:4] == [_LISTENING] and int(row[1].rpartition(":")[2], 16) == port}


def private_folder() -> Path:
    """A new folder of this user alone, in $RAY_TMPDIR or the temporary folder, short enough for the sockets that Ray
    puts below it. Ray is given ``r`` in it: of the folder that it is given it makes one for everybody.

    Not $XDG_RUNTIME_DIR, which goes when the user logs out. Raises BadInput.
    """
    room = SOCKET_BYTES - len(_SOCKET)
    places = [place for place in (os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp") if place]
    for place in places:
        if len(os.fsencode(Path(place).absolute())) <= room:
            try:
                return Path(tempfile.mkdtemp(prefix="ray-", dir=Path(place).absolute()))
            except OSError:
                continue
    text = (
        f"--runner ray: no folder for a cluster ({', '.join(places)}: missing, not writable or over {room} bytes long"
    )
    raise BadInput(f"{text}, with which Ray's sockets have no room); set RAY_TMPDIR")
