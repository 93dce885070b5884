"""One folder on any fsspec filesystem, with the few operations an artifact needs and how durable each one is.

Locally a file appears by rename after fsync. Object stores have no rename and need none: an upload becomes visible
whole. Scratch files, the journal and the lock are always on a local disk.

A folder may come from elsewhere, with links in it: nothing is written, replaced or removed through one. Scratch files
have names that nobody can foresee and are new; a link where a file is to be is replaced, or removed, itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ...errors import ArtifactMismatch, BadInput
from .names import linked_parent

PRIVATE = "_capipe"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_ATTEMPTS = 5
MAX_GROUP_BYTES, MAX_GROUP_VALUES = 8 << 30, 1 << 27  # of a row group, unpacked, and of a column in it; ours: 1000 rows


class NotAFile(OSError):
    """A pipe, a socket or a device in the place of a file that is to be read."""


class Folder:
    """A folder given by path or fsspec URL. Names are relative to it, with ``/``."""

    def __init__(self, url: str) -> None:
        try:
            self.fs, self.path = cast(tuple[fsspec.AbstractFileSystem, str], url_to_fs(url.rstrip("/") or url))
        except (ValueError, ImportError) as error:
            raise BadInput(f"{url}: this kind of path cannot be opened ({error}); install its fsspec driver") from None
        self.url = url.rstrip("/") or url
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.is_shared = self.is_local or "memory" not in _protocols(self.fs)  # visible to other processes

    def full(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.exists(self.full(name)))

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders directly in ``folder`` (sorted, without its path); empty if it is missing."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.full(folder), detail=False)
        except FileNotFoundError:
            return []
        here = self.full(folder).rstrip("/")
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.rstrip("/") != here)

    def open(self, name: str) -> BinaryIO:
        """A file to read. Raises OSError where there is none, or a pipe or device in its place."""
        if self.is_local:
            refuse_irregular(self.local(name))
        return cast(BinaryIO, self.fs.open(self.full(name), "rb"))

    def read_bytes(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def size(self, name: str) -> int:
        return int(self.fs.size(self.full(name)))

    def make(self) -> None:
        """Create the folder where the filesystem has folders."""
        self.fs.makedirs(self.path, exist_ok=True)
        if self.is_local:
            self.local("").mkdir(parents=True, exist_ok=True)

    def local(self, name: str) -> Path:
        """The local path of ``name``; only meaningful where :attr:`is_local`."""
        return Path(self.full(name))

    def private(self, name: str) -> Path:
        """A local path for scratch, journal and lock: in a local artifact, else in the user's cache."""
        if self.is_local:
            return self.local(f"{PRIVATE}/{name}")
        cache = Path(os.environ.get("CAPIPE_CACHE", Path.home() / ".cache" / "capipe"))
        return cache / hashlib.sha256(self.url.encode()).hexdigest()[:32] / name

    def to_write(self, name: str) -> Path:
        """The local path of ``name``, to be written or removed. Raises BadInput where one of its folders is a link."""
        link = linked_parent(self.local(""), name)
        if link is not None:
            raise BadInput(
                f"{link}: a symbolic link, and nothing is written or removed through one; put a folder there"
            )
        return self.local(name)

    def private_to_write(self, name: str) -> Path:
        """:meth:`private`, to be written or removed, with the folder it lies in. Raises as :meth:`to_write`."""
        path = self.to_write(f"{PRIVATE}/{name}") if self.is_local else self.private(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def private_folder(self, name: str) -> Path:
        """A private folder to write in, made where it is missing. Raises as :meth:`to_write`."""
        return self.private_to_write(f"{name}/-").parent

    def publish(self, scratch: Path, name: str) -> None:
        """Make a finished, fsynced scratch file visible under its final name; replaces an older one atomically."""
        if self.is_local:
            target = self.to_write(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.replace(target)
            sync(target.parent)
        else:
            self.fs.put_file(str(scratch), self.full(name))
            scratch.unlink()

    def publish_tree(self, scratch: Path, name: str) -> None:
        """Make a finished scratch folder visible under its final name, in the place of what a crash left there."""
        if self.is_local:
            os.sync()  # one for all: an fsync for each of ten thousand small files would take minutes on a disk
            target = self.to_write(name)
            clear(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.replace(target)
            sync(target.parent)
        else:
            self.remove(name)
            self.fs.put(f"{scratch}/", f"{self.full(name)}/", recursive=True)
            clear(scratch)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file in one visible step."""
        scratch = self.private_folder("tmp") / f"{scratch_name(name)}.{uuid.uuid4().hex[:8]}"
        write_synced(scratch, data)
        self.publish(scratch, name)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all in it, if it is there; of a link the link itself."""
        if not self.is_local:
            if self.exists(name):
                self.fs.rm(self.full(name), recursive=True)
            return
        remove(self.to_write(name))


def scratch_name(name: str) -> str:
    """What a file is called while it is written: scratch folders have no folders in them."""
    return name.replace("/", "+")


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def read_parquet(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole Parquet file of ours, or some of its columns."""
    with parquet_file(folder, name) as file:
        return file.read(columns=columns, use_threads=False)


def parquet_file(folder: Folder, name: str) -> pq.ParquetFile:
    """A Parquet file of ours, as of :func:`open_parquet`."""
    return open_parquet(str(folder.local(name)) if folder.is_local else f"{folder.url}/{name}")


def open_parquet(url: str) -> pq.ParquetFile:
    """A Parquet file, local or remote, to be read in a ``with`` and with ``use_threads=False``. Raises OSError.

    The one place where Parquet is opened to be read, and never by a Python file: Arrow's threads call back into one,
    and a thread that is not done when the interpreter ends aborts the process ("terminate called without an active
    exception", in one of nine `verify` that had printed "clean"). So a local file is Arrow's own to open, and a remote
    one, or one whose name is not UTF-8, is held in memory.
    """
    fs, path = (None, url) if "://" not in url else url_to_fs(url)
    if fs is not None and not isinstance(fs, LocalFileSystem):
        return parquet_of(fs.cat_file(path))
    refuse_irregular(Path(path))
    if any("\ud800" <= c <= "\udfff" for c in path):
        return parquet_of(Path(path).read_bytes())
    return pq.ParquetFile(path)


def parquet_of(data: bytes) -> pq.ParquetFile:
    """A Parquet file that is in memory already."""
    return pq.ParquetFile(pa.BufferReader(data))


def expecting(parquet: pq.ParquetFile, rows: int, where: str) -> pq.ParquetFile:
    """The file, where its footer tells what it unpacks to as it must be: by the manifest it has so many ``rows``.

    A file of a megabyte can hold a thousand million rows that are alike. Closes it and raises ArtifactMismatch, before
    anything is unpacked, where it has others, or a row group too large to be read.
    """
    problem = _oversize(parquet.metadata, rows)
    if problem is None:
        return parquet
    parquet.close()
    raise ArtifactMismatch(f"{where}: {problem}; restore it, or run its stage again with --fresh")


def _oversize(footer: pq.FileMetaData, rows: int) -> str | None:
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    found = max(footer.num_rows, sum(group.num_rows for group in groups))
    if footer.num_rows != rows or found != rows:
        return f"{found} rows, {rows} in the manifest"
    for group in groups:
        values = max((group.column(number).num_values for number in range(group.num_columns)), default=0)
        if group.total_byte_size > MAX_GROUP_BYTES or values > MAX_GROUP_VALUES:
            return f"a row group of {group.total_byte_size} bytes and {values} values in a column"
    return None


def create(path: Path) -> BinaryIO:
    """A new local file to write, in a folder that is made where it is missing. Raises FileExistsError where anything,
    be it a link that leads nowhere, has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return cast(BinaryIO, os.fdopen(os.open(path, _NEW, 0o666), "wb"))


def open_own(path: Path, flags: int = os.O_RDWR) -> int:
    """The handle of a local file of ours that stays (a lock, a log), made where it is missing.

    Raises BadInput where there is a link in its place.
    """
    try:
        return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadInput(f"{path}: a symbolic link, where only a file may be written; remove it") from None
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write and fsync a new local file (as :func:`create`); nothing is left behind when that fails (a full disk)."""
    file = create(path)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def write_new(path: Path, data: bytes) -> None:
    """Put a local file in its place whole, synced, whatever was there: an older one, or a link, which is not followed.

    It is written beside that under a random name; those that killed processes left of it are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        for each in unfinished(path):
            each.unlink(missing_ok=True)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.partial")
        write_synced(scratch, data)
        try:
            scratch.replace(path)
            break
        except FileNotFoundError:  # another process that writes the same file took it for one that was left
            if attempt == _ATTEMPTS - 1:
                raise
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
    sync(path.parent)


def unfinished(path: Path) -> list[Path]:
    """What killed processes left of a file that :func:`write_new` writes; its next writing removes that."""
    scratch = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.partial")
    return [each for each in path.parent.iterdir() if scratch.fullmatch(each.name)]


def refuse_irregular(path: Path) -> None:
    """Raise NotAFile where a path leads to such: reading it may wait, or go on, for ever."""
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise NotAFile(errno.EINVAL, "not a regular file", str(path))


def append_line(path: Path, line: bytes, *, durable: bool = False) -> None:
    """Add a line to a local file that several processes add to; what a crash left behind its last line is cut off.

    ``durable``: fsync it. Where that or the writing fails (a full disk) nothing was added.
    """
    handle = open_own(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        sound = _sound_end(handle, os.lseek(handle, 0, os.SEEK_END))
        try:
            os.ftruncate(handle, sound)
            os.lseek(handle, sound, os.SEEK_SET)
            data = memoryview(line + b"\n")
            while data:
                data = data[os.write(handle, data) :]
            if durable:
                os.fsync(handle)
        except OSError:
            os.ftruncate(handle, sound)
            raise
    finally:
        os.close(handle)


def _sound_end(handle: int, end: int, chunk: int = 1 << 16) -> int:
    """Where the last whole line ends."""
    while end:
        start = max(0, end - chunk)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def sync(path: Path) -> None:
    """Make what a file holds, or the renames inside a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a local file, or a folder and all in it, if it is there; of a link the link itself. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear(path: Path) -> None:
    """:func:`remove`, as far as it can be done."""
    with contextlib.suppress(OSError):
        remove(path)
