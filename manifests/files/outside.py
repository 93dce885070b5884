"""Access check for paths and URLs that come from data: a table's row, a data set's ``path``, a manifest's ``url``.

Locations on the command line are the user's own and are not restricted. Those from data may come from anybody: they
must be a regular local file or an object of a plain store, with a size known before reading, and never a device, a
kernel file, or a chain of file systems (fsspec's ``a::b`` and ``reference:`` have executed code).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

from .tar import printable

SCHEMES = ("https", "http", "s3", "s3a", "gs", "gcs", "hf")  # stores whose URLs name one object each
KERNEL = ("/proc", "/sys", "/dev")  # devices, memory of other processes, settings: not data
MEMORY_DISK = "/dev/shm"  # the exception: regular files, as on a disk
_SAME = {"s3a": "s3", "gcs": "gs"}  # aliases of schemes
MAX_LOCATION = 8192  # characters


class Refused(Exception):
    """A path or URL from data that this command does not open; the message has the reason, and what would allow it."""


class Outside(Refused):
    """A path that leads out of its allowed folder."""


@dataclass(frozen=True)
class Reach:
    """Limits on locations from data. ``within``: a local folder that all paths must lie in, links resolved, and no URLs
    at all. ``public_only``: no URLs of loopback and private addresses (link-local ones are always refused). ``source``:
    the folder (or its URL) that a user named as input, which its own links and lists must not leave either."""

    within: str | None = None
    public_only: bool = False
    source: str | None = None

    def __post_init__(self) -> None:
        for name in ("within", "source"):  # resolved once: needed for each file of a folder
            folder = getattr(self, name)
            if folder is not None and not is_url(folder):
                object.__setattr__(self, name, os.path.realpath(folder))


ANYWHERE = Reach()


def is_url(location: str) -> bool:
    return "://" in location


def check(location: str, reach: Reach = ANYWHERE) -> None:
    """Raise Refused if ``location`` is invalid by its spelling alone; nothing is accessed."""
    _check_text(location)
    if "::" in location and (is_url(location) or ":/" in location or location.partition("::")[0].isalnum()):
        raise Refused(f"{_shown(location)}: a chain of file systems (::) is not opened from data")
    if not is_url(location):
        if location.startswith("/") and _is_kernel(os.path.normpath(location).replace("//", "/")):  # two slashes stay
            raise Refused(f"{_shown(location)}: lies in {', '.join(KERNEL)}, which hold no data")
        return
    scheme = location.partition("://")[0].lower()
    if scheme not in SCHEMES:
        text = f"URLs of {printable(scheme[:40])}: are not opened from data (only {', '.join(SCHEMES)})"
        raise Refused(f"{_shown(location)}: {text}")
    if reach.within is not None:
        raise Outside(f"{_shown(location)}: a URL, where --within {reach.within} allows files of that folder alone")
    if reach.source is not None:
        text = f"leads out of its source, {printable(reach.source)}"
        raise Outside(f"{_shown(location)}: {text}; --follow-links takes it")


def check_below(name: str, url: str, reach: Reach = ANYWHERE) -> None:
    """Raise Refused if ``name``, relative to a ``url`` that a user named, leads to another file system or store."""
    _check_text(name)
    if "::" in name:
        raise Refused(f"{_shown(name)}: a chain of file systems (::) is not opened from data")
    if reach.within is not None:
        raise Outside(f"{_shown(name)}: lies at {_shown(url)}, where --within {reach.within} allows files alone")
    if reach.source is not None and ".." in name.split("/"):
        raise Outside(f"{_shown(name)}: leads out of its source, {_shown(reach.source)}; --follow-links takes it")


def _check_text(location: str) -> None:
    if not location or len(location) > MAX_LOCATION or "\0" in location:
        raise Refused(f"no path or URL ({len(location)} characters, or a zero byte)")


def _shown(location: str) -> str:
    """A path or URL for a message; made only when needed, since it takes as long as opening a file."""
    return printable(location[:200])


def open_local(path: str, reach: Reach = ANYWHERE) -> BinaryIO:
    """Open a regular local file for reading. Raises Refused if it is not one or lies outside the limits; OSError.

    The checks are made on the opened file: it cannot be replaced between check and reading.
    """
    check(path, reach)
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except OSError:
        _check_place(os.path.realpath(path), path, reach)  # does not reveal whether a link's outside target exists
        raise
    if not stat.S_ISREG(mode):  # before opening: that may trigger a device, or block forever on a pipe
        raise Refused(f"{_shown(path)}: not a regular file (a folder, pipe, socket or device)")
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_opened(handle, path, reach)
        return cast(BinaryIO, os.fdopen(handle, "rb"))
    except BaseException:
        os.close(handle)
        raise


def refusal(path: str, reach: Reach = ANYWHERE) -> str | None:
    """Why a listed local file is not read, or None: for files that a library opens by name."""
    try:
        if not is_url(path):
            open_local(path, reach).close()
    except Refused as error:
        return str(error)
    except OSError:  # its reader gives a better message
        return None
    return None


def _check_opened(handle: int, path: str, reach: Reach) -> None:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise Refused(f"{_shown(path)}: not a regular file (a folder, pipe, socket or device)")
    _check_place(_real_path(handle, path), path, reach)


def _check_place(real: str, path: str, reach: Reach) -> None:
    """Raise Refused if ``path``, which is ``real`` with links resolved, lies outside the limits."""
    if _is_kernel(real):
        raise Refused(f"{_shown(path)}: lies in {', '.join(KERNEL)}, which hold no data")
    if reach.within is not None and not _lies_in(real, reach.within):
        raise Outside(f"{_shown(path)}: lies outside --within {printable(reach.within)}")
    if reach.source is not None and not _lies_in(real, reach.source):
        text = f"{_shown(path)}: leads out of its source, {printable(reach.source)}"
        raise Outside(f"{text}; --follow-links takes it")


def _real_path(handle: int, path: str) -> str:
    """Path of an open file, links resolved: by the kernel if possible (a link can change meanwhile)."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}")  # noqa: PTH115
    except OSError:
        return os.path.realpath(path)


_BELOW_KERNEL = tuple(f"{folder}/" for folder in KERNEL)


def _is_kernel(path: str) -> bool:
    return (path in KERNEL or path.startswith(_BELOW_KERNEL)) and not _lies_in(path, MEMORY_DISK)


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def source_folder(folder: str) -> str:
    """The folder that counts as the source if ``folder`` was named: itself, links resolved.

    For a snapshot in a Hugging Face cache (``models--a/snapshots/<revision>/…``), whose files are links into ``blobs``
    beside ``snapshots``, it is the repository's folder.
    """
    real = Path(os.path.realpath(folder))
    for parent in (real, *real.parents):
        if parent.parent.name == "snapshots" and (parent.parent.parent / "blobs").is_dir():
            return str(parent.parent.parent)
    return str(real)


def leaves(path: str, folder: str) -> bool:
    """True if a local path leads out of ``folder`` by a link: both are resolved. Missing files are resolved by name."""
    return not _lies_in(os.path.realpath(path), os.path.realpath(folder))


def store(url: str) -> tuple[str, str]:
    """Scheme and host, bucket or repository: equal for two URLs of one store. ``("", "")`` for local paths."""
    if not is_url(url):
        return "", ""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.netloc.lower()
    if scheme == "hf":  # hf://owner/model, hf://datasets/owner/name
        more = parts.path.split("/")[1 : 3 if host in ("datasets", "spaces") else 2]
        return scheme, "/".join([host, *more]).partition("@")[0]
    return _SAME.get(scheme, scheme), host
