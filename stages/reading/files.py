"""File reading, whole or first bytes: paths given by the user, and access-checked paths that occur in data."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO, cast

from ...manifests.files.outside import ANYWHERE, Reach, Refused, check, check_below, is_url, open_local
from ...manifests.files.stores import StoreFile, filesystem
from ...manifests.files.tar import MAX_MEMBER_BYTES
from ...manifests.status import Status
from ...models.images.formats import HEAD_BYTES, ImageProblem, sniff
from .faults import read_problem


def join(root: str, name: str) -> str:
    """``name`` in the folder ``root``, both paths or URLs; an absolute name stays as it is."""
    return name if not root or name.startswith("/") else f"{root.rstrip('/')}/{name}"


def open_binary(path: str) -> BinaryIO:
    """Open a path or URL given by the user; local files without fsspec."""
    if not is_url(path):
        return cast(BinaryIO, open(path, "rb"))  # noqa: PTH123
    fs, inner = filesystem(path)
    return fs.open(inner)


def read_file(name: str, root: str = "", reach: Reach | None = ANYWHERE) -> tuple[bytes | None, ImageProblem | None]:
    """A file's bytes, or the problem: unreadable, or far larger than any image (then only its first bytes are read).

    ``name`` comes from data or a listing and is relative to ``root``, which the user gave, unless it is absolute or a
    URL. ``reach``: the locations it may lead to; None if the user gave the name as well.
    """
    try:
        opened = _opened(name, root, reach, MAX_MEMBER_BYTES)
        data, size, whole = opened if isinstance(opened, tuple) else _read(opened, MAX_MEMBER_BYTES)
    except Refused as refusal:
        return None, ImageProblem(Status.UNSUPPORTED, str(refusal))
    except Exception as error:  # remote storage libraries raise errors of any type
        return None, read_problem(error) or ImageProblem(Status.UNSUPPORTED, f"cannot be read: {error}")
    if whole:
        return data, None
    kind = sniff(data[:HEAD_BYTES])
    if isinstance(kind, ImageProblem):
        return None, kind
    what = "file over" if size is None else f"file of {size} bytes, over"
    return None, ImageProblem(Status.TOO_LARGE, f"{what} the limit of {MAX_MEMBER_BYTES}")


def read_head(name: str, root: str = "", reach: Reach | None = ANYWHERE) -> bytes | None:
    """A file's first bytes, to detect its format; None for a user's path that is not a file (a pipe would block).

    Raises Refused, OSError, and any error of the remote storage libraries.
    """
    if reach is None and not is_url(root) and not Path(join(root, name)).is_file():
        return None
    opened = _opened(name, root, reach, HEAD_BYTES)
    if isinstance(opened, tuple):
        return opened[0]
    with opened:
        return opened.read(HEAD_BYTES)


_Read = tuple[bytes, int | None, bool]  # bytes; file size if known; True if the bytes are the whole file


def _opened(name: str, root: str, reach: Reach | None, limit: int) -> BinaryIO | _Read:
    """Open a file for :func:`read_file`; over HTTP, read up to ``limit``. Raises Refused and any storage error."""
    if reach is None:
        return open_binary(join(root, name))
    if is_url(name):
        check(name, reach)
        url = name
    elif is_url(root) and not name.startswith("/"):
        check_below(name, root, reach)
        url = join(root, name)
    else:
        return open_local(join(root, name), reach)
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme in ("http", "https"):
        from .http import fetch  # deferred: importing aiohttp takes a third of a second

        answer = fetch(f"{scheme}://{rest}", limit, reach)
        return answer.data, answer.size, answer.whole
    if scheme in ("file", "local"):
        return open_local(rest, reach)
    fs, path = filesystem(f"{scheme}://{rest}")
    return fs.open(path)


def _read(file: BinaryIO, limit: int) -> _Read:
    """Read a file up to ``limit``; only the first bytes of one known to be larger. Raises OSError."""
    with file:
        size = _size(file)
        if size is None:
            data = _read_stream(file, limit)
            return data[:limit], None, len(data) <= limit
        if size > limit:
            return file.read(HEAD_BYTES), size, False
        data = file.read(size)
        if len(data) == size and file.read(1):
            raise OSError("it grew while it was read")
        return data, size, True


def _size(file: BinaryIO) -> int | None:
    """Size of an open file; None if the server does not report it and the stream is not seekable."""
    if isinstance(file, StoreFile):
        return file.size
    if isinstance(file, io.BufferedReader):
        return os.fstat(file.fileno()).st_size
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def _read_stream(file: BinaryIO, limit: int) -> bytes:
    data = bytearray()
    while len(data) <= limit and (part := file.read(1 << 20)):
        data += part
    return bytes(data)
