"""File systems by URL: the one door to fsspec. Errors of stores come out of it as OSErrors that name the URL.

Passing errors (throttling, resets, timeouts, HTTP 5xx) are tried again, with growing pauses, for :func:`patience`
seconds in all.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from http import HTTPStatus
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.config import conf
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ...errors import BadInput
from .store_errors import http_code, is_passing, translated

T = TypeVar("T")

PATIENCE, PATIENCE_VARIABLE = 60.0, "CAPIPE_STORE_PATIENCE"  # seconds for passing errors of one operation
_LONGEST_PAUSE = 15.0
BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss")  # stores whose paths begin with a bucket
#: Stores with a conditional creation in fsspec's ``mode="create"`` (If-None-Match, ifGenerationMatch). Others check
#: whether there is an object, then write: two writers may both succeed.
CONDITIONAL = ("s3", "s3a", "gs", "gcs", "memory")
#: botocore's and s3fs's own retries, which repeat a single part of a large file, are few: those here come on top.
_S3_RETRIES = {"retries": {"mode": "standard", "total_max_attempts": 3}}
_S3_TRIES = 2


_at_most: ContextVar[float] = ContextVar("capipe_store_patience", default=float("inf"))


def patience() -> float:
    """Seconds for which passing errors of one operation are tried again: :data:`PATIENCE`, or of the environment."""
    try:
        asked = max(0.0, float(os.environ.get(PATIENCE_VARIABLE, PATIENCE)))
    except ValueError:
        asked = PATIENCE
    return min(asked, _at_most.get())


@contextmanager
def impatient(seconds: float) -> Iterator[None]:
    """In this thread have less patience: somebody waits for what is read, and can do without."""
    token = _at_most.set(seconds)
    try:
        yield
    finally:
        _at_most.reset(token)


class Store:
    """The operations of a file system that capipe uses, on paths without the scheme. All raise OSError alone."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self.is_local = isinstance(fs, LocalFileSystem)
        self.protocols: tuple[str, ...] = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
        self.has_buckets = self.protocols[0] in BUCKETS
        self.may_create = self.protocols[0] in CONDITIONAL

    def url(self, path: str) -> str:
        """The URL of a path; one spelling for all of a store's schemes (``s3a`` is ``s3``)."""
        return path if self.is_local else f"{self.protocols[0]}://{path.lstrip('/')}"

    def call(self, name: str, path: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the file system about ``path``, with retries."""
        function = getattr(self._fs, name)
        return function(path, *args, **kwargs) if self.is_local else self.tried(path, function, path, *args, **kwargs)

    def tried(self, path: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function about ``path``, with retries."""
        deadline, pause = time.monotonic() + patience(), 0.5
        while True:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                known = translated(error, self.url(path))
                if known is None:
                    raise
                if not is_passing(error) or time.monotonic() + pause > deadline:
                    raise known from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def exists(self, path: str) -> bool:
        return bool(self.call("exists", path))

    def isdir(self, path: str) -> bool:
        return bool(self.call("isdir", path))

    def isfile(self, path: str) -> bool:
        return bool(self.call("isfile", path))

    def size(self, path: str) -> int:
        return int(self.call("size", path))

    def info(self, path: str) -> dict[str, Any]:
        return cast(dict[str, Any], self.call("info", path))

    def listed(self, path: str) -> list[dict[str, Any]]:
        """Entries directly in a folder, with ``name`` (a path), ``size`` and ``type``. Raises FileNotFoundError."""
        if not self.is_local:
            self._fs.invalidate_cache()
        return cast(list[dict[str, Any]], self.call("ls", path, detail=True))

    def find(self, path: str) -> dict[str, dict[str, Any]]:
        """All files below a folder, by path, with their facts."""
        return cast(dict[str, dict[str, Any]], self.call("find", path, detail=True))

    def glob(self, pattern: str) -> dict[str, dict[str, Any]]:
        return cast(dict[str, dict[str, Any]], self.call("glob", pattern, detail=True))

    def modified(self, path: str) -> float:
        """When a file was written, in epoch seconds of the store's clock."""
        return stamp(self.info(path))

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading."""
        if self.is_local:
            return cast(BinaryIO, self._fs.open(path, "rb"))
        return cast(BinaryIO, StoreFile(_Stream(self, path, self.call("open", path, "rb"))))

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """A file's bytes, or a range of them; one request."""
        # Without a start some drivers ask for the size first. A range of an empty file is refused by S3.
        if start == 0 and end is None and not self.is_local:
            try:
                return cast(bytes, self.call("cat_file", path, start=0))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return cast(bytes, self.call("cat_file", path))
        return cast(bytes, self.call("cat_file", path, start=start or None, end=end))

    def read_all(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Bytes of many small files, many requests at a time; those that are gone are left out."""
        asked = list(paths)
        if not asked:
            return {}
        found: dict[str, Any] = self.tried(asked[0], self._fs.cat, asked, on_error="return", start=0)
        read: dict[str, bytes] = {}
        for path in asked:
            data = found.get(path)
            if not isinstance(data, bytes):
                try:
                    data = self.read(path)
                except FileNotFoundError:
                    continue
            read[path] = data
        return read

    def put(self, source: str, path: str) -> None:
        """Upload a local file; replaces an older one in one step."""
        self.call("put_file", source, path) if self.is_local else self.tried(path, self._fs.put_file, source, path)

    def write(self, data: bytes, path: str) -> None:
        """Upload bytes; replaces an older file in one step."""
        self.tried(path, self._fs.pipe_file, path, data)

    def put_all(self, files: Mapping[str, str]) -> None:
        """Upload local files to paths, many at a time; older ones are replaced."""
        if files:
            self.tried(next(iter(files.values())), self._fs.put, list(files), list(files.values()))

    def create(self, source: str | bytes, path: str) -> bool:
        """Upload a local file (or bytes) if there is none of that name; False if there is. Atomic if ``may_create``.

        After an answer was lost, the second try may find the first one's object: compare it.
        """
        name = "put_file" if isinstance(source, str) else "pipe_file"
        words = (source, path) if isinstance(source, str) else (path, source)
        try:
            self.tried(path, getattr(self._fs, name), *words, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if http_code(error) == HTTPStatus.PRECONDITION_FAILED:
                return False
            raise
        return True

    def copy(self, source: str, path: str) -> None:
        """Copy a file inside the store, replacing an older one."""
        self.tried(source, self._fs.cp_file, source, path)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with its contents, if it exists."""
        if self.is_local:
            self.call("rm", path, recursive=True)
        elif files := list(self.find(path)):
            self.tried(path, self._fs.rm, files)

    def remove_file(self, path: str) -> None:
        """Remove a single file, if it exists; one request."""
        with contextlib.suppress(FileNotFoundError):
            self.call("rm_file", path)

    def make_folder(self, path: str) -> None:
        """Create a folder, where the file system has folders. Raises BadInput if the store has no such bucket: one is
        never created."""
        if not self.has_buckets:
            self.call("makedirs", path, exist_ok=True)
            return
        bucket = path.partition("/")[0]
        try:
            self.info(bucket)
        except FileNotFoundError:
            text = f"{self.url(path)}: there is no bucket {bucket!r}; check its name, or create it first"
            raise BadInput(text) from None
        except PermissionError:
            pass  # a user of its objects need not be allowed to ask about it

    def unfinished_uploads(self, path: str) -> Iterator[tuple[str, str]]:
        """Multipart uploads below ``path`` that were begun and not completed: key's path and upload id; S3 alone."""
        if self.protocols[0] != "s3":
            return
        bucket, _, prefix = path.partition("/")
        more: dict[str, Any] = {}
        while True:
            page = self.tried(
                path, self._fs.call_s3, "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **more
            )
            for upload in page.get("Uploads", ()):
                yield f"{bucket}/{upload['Key']}", str(upload["UploadId"])
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_upload(self, path: str, upload: str) -> None:
        """Abort a multipart upload: its parts, which cost as much as an object, are removed."""
        bucket, _, key = path.partition("/")
        try:
            self.tried(path, self._fs.call_s3, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        except FileNotFoundError:
            return

    def unstrip(self, path: str) -> str:
        return str(self._fs.unstrip_protocol(path))


class _Stream(io.RawIOBase):
    """A remote file opened for reading; reads that fail in passing are repeated."""

    def __init__(self, store: Store, path: str, file: Any) -> None:
        self._store, self._path, self._file = store, path, file
        self._seekable = bool(file.seekable())
        reported = getattr(file, "size", None)
        self.size = None if reported is None else int(reported)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._store.tried(self._path, self._file.seek, offset, whence))

    def readinto(self, buffer: Any) -> int:
        at = self._file.tell() if self._seekable else 0

        def read() -> bytes:
            if self._seekable and self._file.tell() != at:
                self._file.seek(at)
            return cast(bytes, self._file.read(len(buffer)))

        if self._seekable:
            data = self._store.tried(self._path, read)
        else:
            try:
                data = read()
            except Exception as error:
                raise translated(error, self._store.url(self._path)) or error from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class StoreFile(io.BufferedReader):
    """A remote file opened for reading. ``size``: in bytes; None if the server does not report it."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__(stream, 1 << 20)
        self.size = stream.size


def filesystem(url: str) -> tuple[Store, str]:
    """The file system of a path or fsspec URL, and the path on it. Raises BadInput if no driver takes the URL."""
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        own = conf.get("s3", {}).get("config_kwargs", {})  # of the user's fsspec configuration
        options = {"use_listings_cache": False, "config_kwargs": {**_S3_RETRIES, **own}}
    elif scheme in BUCKETS:
        options = {"use_listings_cache": False}
    try:
        fs, path = url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise BadInput(f"{url}: this kind of path cannot be opened ({error}); install its fsspec driver") from None
    if scheme in ("s3", "s3a"):
        fs.retries = _S3_TRIES
    return Store(cast(fsspec.AbstractFileSystem, fs)), str(path)


def stamp(info: Mapping[str, Any]) -> float:
    """When a file was written, by its facts; 0 if they do not say."""
    for name in ("LastModified", "mtime", "updated", "created", "last_modified"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def etag(info: Mapping[str, Any]) -> str:
    """A mark that changes with the bytes of an object, by its facts; "" if they have none."""
    return str(info.get("ETag") or info.get("etag") or info.get("md5Hash") or "")
