"""The door for paths and URLs that come out of data: a table's row, a data set's ``path``, a manifest's ``url``.

What the command line names is the user's own and passes freely. What data names was written by anybody: it leads to a
regular local file or to an object of a plain store, is of a known size before it is read, and never to a device, to
what the kernel shows as files, or through a chain of file systems (fsspec's ``a::b`` and ``reference:`` have run code).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

from .tar import printable

SCHEMES = ("https", "http", "s3", "s3a", "gs", "gcs", "hf")  # of stores that name one object each
KERNEL = ("/proc", "/sys", "/dev")  # their files are no data: devices, other processes' memory, settings
MEMORY_DISK = "/dev/shm"  # but for this one, which holds regular files like any disk
MAX_LOCATION = 8192  # characters


class Refused(Exception):
    """A path or URL out of data that this command does not open; its text says why, and what would let it."""


@dataclass(frozen=True)
class Reach:
    """How far data may lead. ``within``: a local folder that all its paths must lie in, links resolved, and no URL at
    all. ``public_only``: no URLs of loopback and private addresses (link-local ones never are)."""

    within: str | None = None
    public_only: bool = False


ANYWHERE = Reach()


def is_url(location: str) -> bool:
    return "://" in location


def check(location: str, reach: Reach = ANYWHERE) -> None:
    """Raise Refused where ``location`` cannot be meant, by its spelling alone; nothing is looked at."""
    shown = printable(location[:200])
    if not location or len(location) > MAX_LOCATION or "\0" in location:
        raise Refused(f"no path or URL ({len(location)} characters, or a zero byte)")
    if "::" in location and (is_url(location) or ":/" in location or location.partition("::")[0].isalnum()):
        raise Refused(f"{shown}: a chain of file systems (::) is not opened from data")
    if not is_url(location):
        if _is_kernel(os.path.normpath(location)):
            raise Refused(f"{shown}: lies in {', '.join(KERNEL)}, which hold no data")
        return
    scheme = location.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise Refused(
            f"{shown}: URLs of {printable(scheme[:40])}: are not opened from data (only {', '.join(SCHEMES)})"
        )
    if reach.within is not None:
        raise Refused(f"{shown}: a URL, where --within {reach.within} allows files of that folder alone")


def open_local(path: str, reach: Reach = ANYWHERE) -> BinaryIO:
    """A regular local file, opened to be read. Raises Refused where it is none or lies where it may not; OSError.

    What was opened is what is asked: nothing can be put in its place between the question and the reading.
    """
    check(path, reach)
    if not stat.S_ISREG(
        Path(path).stat().st_mode
    ):  # before opening: a device may act on that, a pipe may wait for ever
        raise Refused(f"{printable(path[:200])}: not a regular file (a folder, pipe, socket or device)")
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_opened(handle, path, reach)
        return cast(BinaryIO, os.fdopen(handle, "rb"))
    except BaseException:
        os.close(handle)
        raise


def _check_opened(handle: int, path: str, reach: Reach) -> None:
    shown = printable(path[:200])
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise Refused(f"{shown}: not a regular file (a folder, pipe, socket or device)")
    real = _real_path(handle, path)
    if _is_kernel(real):
        raise Refused(f"{shown}: lies in {', '.join(KERNEL)}, which hold no data")
    if reach.within is not None and not _lies_in(real, os.path.realpath(reach.within)):
        raise Refused(f"{shown}: lies outside --within {reach.within}")


def _real_path(handle: int, path: str) -> str:
    """Where an open file lies, links resolved: by the kernel where it tells (a link can change meanwhile)."""
    try:
        return str(Path(f"/proc/self/fd/{handle}").readlink())
    except OSError:
        return os.path.realpath(path)


_BELOW_KERNEL = tuple(f"{folder}/" for folder in KERNEL)


def _is_kernel(path: str) -> bool:
    return (path in KERNEL or path.startswith(_BELOW_KERNEL)) and not _lies_in(path, MEMORY_DISK)


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def leaves(path: str, folder: str) -> bool:
    """Whether a local path leads out of ``folder`` by a link: both are resolved. A missing file leads where it says."""
    return not _lies_in(os.path.realpath(path), os.path.realpath(folder))


_SAME = {"s3a": "s3", "gcs": "gs"}  # schemes of the same stores


def store(url: str) -> tuple[str, str]:
    """Scheme and host, bucket or repository: what two URLs of one store share. Local paths share ``("", "")``."""
    if not is_url(url):
        return "", ""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.netloc.lower()
    if scheme == "hf":  # hf://owner/model, hf://datasets/owner/name
        more = parts.path.split("/")[1 : 3 if host in ("datasets", "spaces") else 2]
        return scheme, "/".join([host, *more]).partition("@")[0]
    return _SAME.get(scheme, scheme), host
