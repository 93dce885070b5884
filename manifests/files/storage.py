"""A folder on any fsspec file system, with the operations an artifact needs and their durability.

Locally a file appears by rename after fsync. Object stores have no rename and need none: an upload becomes visible as a
whole. Scratch files, the journal and the lock are always on a local disk.

A folder may come from elsewhere and contain links: nothing is written, replaced or removed through one. Scratch files
are new and have unpredictable names; a link in the place of a file is itself replaced or removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from ...errors import BadInput, DamagedShard
from .locks import wait_for
from .names import linked_parent
from .stores import etag, filesystem, stamp

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PRIVATE = "_capipe"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_ATTEMPTS = 5
MAX_GROUP_BYTES, MAX_GROUP_VALUES = 8 << 30, 1 << 27  # per row group, unpacked, and per column; ours: 1000 rows


class NotAFile(OSError):
    """A pipe, a socket or a device in place of a file to read."""


class Folder:
    """A folder given by path or fsspec URL. Names are relative to it, with ``/``."""

    def __init__(self, url: str) -> None:
        self.fs, self.path = filesystem(url.rstrip("/") or url)
        self.url = url.rstrip("/") or url
        self.is_local = self.fs.is_local
        self.is_shared = "memory" not in self.fs.protocols  # visible to other processes

    def full(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def exists(self, name: str = "") -> bool:
        return self.fs.exists(self.full(name))

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders directly in ``folder`` (sorted, without path); empty if it does not exist."""
        if not self.is_local:
            return sorted(self.stamps(folder))
        try:
            return sorted(os.listdir(self.local(folder)))  # noqa: PTH208  (names alone: there may be a million)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def stamps(self, folder: str = "") -> dict[str, float]:
        """The same, each with its last change by the file system's clock, in epoch seconds (0 for folders in a store).
        One listing."""
        try:
            entries = self.fs.listed(self.full(folder))
        except FileNotFoundError:
            return {}
        here = self.full(folder).rstrip("/")
        by_path = {str(entry["name"]).rstrip("/"): stamp(entry) for entry in entries}
        return {path.rsplit("/", 1)[-1]: time for path, time in by_path.items() if path != here}

    def marks(self, folder: str) -> dict[str, str]:
        """The files directly in a folder of a store, each with its ETag ("" if the store has none). One listing."""
        try:
            entries = self.fs.listed(self.full(folder))
        except FileNotFoundError:
            return {}
        files = (entry for entry in entries if entry.get("type") != "directory")
        return {str(entry["name"]).rsplit("/", 1)[-1]: etag(entry) for entry in files}

    @cached_property
    def is_conditional(self) -> bool:
        """True if the store creates an object only where there is none, as one step; found out by trying it."""
        if self.is_local or not self.fs.may_create:
            return False
        probe = self.full(f"{PRIVATE}/probe/{uuid.uuid4().hex}")
        try:
            return self.fs.create(b"1", probe) and not self.fs.create(b"2", probe)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL):
                raise
            return False
        finally:
            self.fs.remove_file(probe)

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises OSError if there is none, or a pipe or device in its place."""
        if self.is_local:
            refuse_irregular(self.local(name))
        return self.fs.open(self.full(name))

    def read_bytes(self, name: str) -> bytes:
        if not self.is_local:
            return self.fs.read(self.full(name))
        with self.open(name) as file:
            return file.read()

    def size(self, name: str) -> int:
        return self.fs.size(self.full(name))

    def make(self) -> None:
        """Create the folder, if the file system has folders. Raises BadInput if its bucket does not exist."""
        self.fs.make_folder(self.path)

    def local(self, name: str) -> Path:
        """The local path of ``name``; only valid if :attr:`is_local`."""
        return Path(self.full(name))

    def private(self, name: str) -> Path:
        """A local path for scratch, journal and lock: inside a local artifact, else in the user's cache."""
        if self.is_local:
            return self.local(f"{PRIVATE}/{name}")
        cache = Path(os.environ.get("CAPIPE_CACHE", Path.home() / ".cache" / "capipe"))
        return cache / hashlib.sha256(self.fs.url(self.path).encode()).hexdigest()[:32] / name

    def to_write(self, name: str) -> Path:
        """The local path of ``name``, for writing or removing. Raises BadInput if one of its folders is a link."""
        link = linked_parent(self.local(""), name)
        if link is not None:
            raise BadInput(
                f"{link}: a symbolic link, and nothing is written or removed through one; put a folder there"
            )
        return self.local(name)

    def private_to_write(self, name: str) -> Path:
        """:meth:`private`, for writing or removing; its parent folder is created. Raises as :meth:`to_write`."""
        path = self.to_write(f"{PRIVATE}/{name}") if self.is_local else self.private(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def private_folder(self, name: str) -> Path:
        """A private folder to write in, created if missing. Raises as :meth:`to_write`."""
        return self.private_to_write(f"{name}/-").parent

    def publish(self, scratch: Path, name: str) -> None:
        """Move a finished, fsynced scratch file to its final name; replaces an older one atomically."""
        if self.is_local:
            target = self.to_write(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.replace(target)
            sync(target.parent)
        else:
            self.fs.put(str(scratch), self.full(name))
            scratch.unlink()

    def publish_tree(self, scratch: Path, name: str) -> None:
        """Move a finished scratch folder to its final name, replacing leftovers of a crash."""
        if self.is_local:
            os.sync()  # one sync for all: an fsync for each of ten thousand small files would take minutes on a disk
            target = self.to_write(name)
            clear(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.replace(target)
            sync(target.parent)
        else:
            paths = (path for path in scratch.rglob("*") if path.is_file())
            files = {str(path): self.full(f"{name}/{path.relative_to(scratch).as_posix()}") for path in paths}
            older = [path for path in self.fs.find(self.full(name)) if path not in {*files.values()}]
            self.fs.put_all(files)
            for path in older:
                self.fs.remove_file(path)
            clear(scratch)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, visible in one step; replaces an older one."""
        if not self.is_local:
            self.fs.write(data, self.full(name))
            return
        scratch = self.private_folder("tmp") / f"{scratch_name(name)}.{uuid.uuid4().hex[:8]}"
        write_synced(scratch, data)
        self.publish(scratch, name)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with its contents, if it exists; a link itself, not its target."""
        if self.is_local:
            remove(self.to_write(name))
        else:
            self.fs.remove(self.full(name))

    def remove_file(self, name: str) -> None:
        """:meth:`remove` for what is no folder: one request to a store."""
        if self.is_local:
            remove(self.to_write(name))
        else:
            self.fs.remove_file(self.full(name))


def scratch_name(name: str) -> str:
    """A file's name while it is being written: scratch folders have no subfolders."""
    return name.replace("/", "+")


def read_parquet(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole Parquet file of ours, or some of its columns."""
    with parquet_file(folder, name) as file:
        return file.read(columns=columns, use_threads=False)


def parquet_file(folder: Folder, name: str) -> pq.ParquetFile:
    """A Parquet file of ours, opened as by :func:`open_parquet`."""
    return open_parquet(str(folder.local(name))) if folder.is_local else parquet_of(folder.read_bytes(name))


def open_parquet(url: str) -> pq.ParquetFile:
    """Open a Parquet file, local or remote, for reading in a ``with`` and with ``use_threads=False``. Raises OSError.

    All Parquet files are opened for reading here, and never as a Python file: Arrow's threads call back into one, and a
    thread still running when the interpreter exits aborts the process ("terminate called without an active exception",
    in one of nine runs of `verify` that had printed "clean"). So Arrow itself opens local files, and a remote file, or
    one whose name is not UTF-8, is loaded into memory.
    """
    fs, path = (None, url) if "://" not in url else filesystem(url)
    if fs is not None and not fs.is_local:
        return parquet_of(fs.read(path))
    refuse_irregular(Path(path))
    if any("\ud800" <= c <= "\udfff" for c in path):
        return parquet_of(Path(path).read_bytes())
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def parquet_of(data: bytes) -> pq.ParquetFile:
    """A Parquet file from bytes in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.BufferReader(data))


def expecting(parquet: pq.ParquetFile, rows: int, where: str) -> pq.ParquetFile:
    """The file, if its footer has the expected number of ``rows`` (by the manifest) and row groups of readable size.

    Otherwise closes it and raises ArtifactMismatch, before anything is decompressed: a file of a megabyte can contain a
    billion identical rows.
    """
    problem = _oversize(parquet.metadata, rows)
    if problem is None:
        return parquet
    parquet.close()
    raise DamagedShard(f"{where}: {problem}; restore it, or run its stage again with --fresh")


def _oversize(footer: pq.FileMetaData, rows: int) -> str | None:
    actual = max(footer.num_rows, sum(footer.row_group(at).num_rows for at in range(footer.num_row_groups)))
    wrong = f"{actual} rows, {rows} in the manifest"
    return wrong if {footer.num_rows, actual} != {rows} else oversized_group(footer)


def oversized_group(footer: pq.FileMetaData) -> str | None:
    """A row group that is not read, as it would not fit in memory; None if there is none."""
    for group in map(footer.row_group, range(footer.num_row_groups)):
        values = max((group.column(number).num_values for number in range(group.num_columns)), default=0)
        if group.total_byte_size > MAX_GROUP_BYTES or values > MAX_GROUP_VALUES:
            return f"a row group of {group.total_byte_size} bytes and {values} values in a column"
    return None


def create(path: Path) -> BinaryIO:
    """Create a local file for writing, and its folder if missing. Raises FileExistsError for any existing entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return cast(BinaryIO, os.fdopen(os.open(path, _NEW, 0o666), "wb"))


def open_own(path: Path, flags: int = os.O_RDWR) -> int:
    """File handle of a persistent local file of ours (a lock, a log), created if missing.

    Raises BadInput if there is a link in its place.
    """
    try:
        return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadInput(f"{path}: a symbolic link, where only a file may be written; remove it") from None
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write and fsync a new local file (as :func:`create`); nothing is left behind on failure (a full disk)."""
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
    """Replace or create a local file atomically and synced; a link in its place is replaced, not followed.

    It is written beside the target under a random name; partial files left by killed processes are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        for leftover in unfinished(path):
            leftover.unlink(missing_ok=True)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.partial")
        write_synced(scratch, data)
        try:
            scratch.replace(path)
            break
        except FileNotFoundError:  # removed as a leftover by another process that writes the same file
            if attempt == _ATTEMPTS - 1:
                raise
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
    sync(path.parent)


def unfinished(path: Path) -> list[Path]:
    """Partial files that killed processes left of a file written by :func:`write_new`; its next write removes them."""
    scratch = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.partial")
    return [file for file in path.parent.iterdir() if scratch.fullmatch(file.name)]


def refuse_irregular(path: Path) -> None:
    """Raise NotAFile if a path leads to a pipe, socket or device: reading it may block or never end."""
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise NotAFile(errno.EINVAL, "not a regular file", str(path))


def append_line(path: Path, line: bytes, *, durable: bool = False) -> None:
    """Append a line to a local file shared by several processes; a partial last line, left by a crash, is cut off.

    ``durable``: fsync it. If that or the write fails (a full disk), nothing is added.
    """
    handle = open_own(path)
    try:
        wait_for(handle, str(path))
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
    """Offset of the end of the last complete line."""
    while end:
        start = max(0, end - chunk)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def sync(path: Path) -> None:
    """Make a file's contents, or the renames inside a folder, survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a local file, or a folder with its contents; a link itself, not its target. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear(path: Path) -> None:
    """:func:`remove`, ignoring errors."""
    with contextlib.suppress(OSError):
        remove(path)
