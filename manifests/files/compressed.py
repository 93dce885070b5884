"""Compressed tars, detected by their first bytes and never by their name, and read as if uncompressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, BinaryIO, Protocol, cast

_CHUNK = 1 << 20
_IN_MEMORY = 64 << 20  # bytes of a copy kept in memory before it moves to a temporary file
_NAME = re.compile(r"(?<=[^/])\.(?:tar(?:\.(?:gz|bz2|xz|zst|zstd))?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


class Digest(Protocol):
    """The part of the interface of ``hashlib`` objects that is used here."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _damage() -> tuple[type[Exception], ...]:
    """What readers raise on damaged data."""
    import pyarrow as pa

    return (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


def _zstd(stream: Any) -> _Reader:
    import pyarrow as pa

    return cast(_Reader, pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd"))


_KINDS: tuple[tuple[bytes, str, Callable[[Any], _Reader]], ...] = (
    (b"\x1f\x8b", "gzip", lambda stream: gzip.GzipFile(fileobj=stream, mode="rb")),
    (b"BZh", "bzip2", bz2.BZ2File),
    (b"\xfd7zXZ\0", "xz", lzma.LZMAFile),
    (b"\x28\xb5\x2f\xfd", "zstandard", _zstd),
)


def tar_stem(name: str) -> str | None:
    """Map ``00000.tar`` or ``00000.tar.gz`` to ``00000``; None if the name is not that of a tar."""
    stem = _NAME.sub("", name)
    return stem if stem != name else None


def unpacked(stream: BinaryIO, digest: Digest | None = None) -> Unpacked | None:
    """The decompressed ``stream``; None if it is not compressed, with the position back at its start.

    ``digest`` gets the bytes of ``stream`` itself as they are read; all of them after :meth:`Unpacked.drain`.
    """
    if not stream.seekable():
        return None
    start = stream.tell()
    head = stream.read(6)
    stream.seek(start)
    match = next((kind for kind in _KINDS if head.startswith(kind[0])), None)
    return Unpacked(stream, match[1], match[2], digest) if match is not None else None


def plain(stream: BinaryIO) -> BinaryIO:
    """``stream``, decompressed if necessary, readable at any offset."""
    decompressed = unpacked(stream)
    return stream if decompressed is None else cast(BinaryIO, decompressed)


class _Packed(io.RawIOBase):
    """The compressed bytes, hashed as they are read. ``error``: a failure to read them, as opposed to damaged data."""

    def __init__(self, stream: BinaryIO, digest: Digest | None) -> None:
        self._stream, self._digest = stream, digest
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            self.error = error
            raise
        buffer[: len(data)] = data
        if self._digest is not None:
            self._digest.update(data)
        return len(data)


class Unpacked:
    """The decompressed bytes of a stream. Reading forward costs no memory and no disk; the first seek backward makes a
    full copy (a temporary file if it is large). Damage ends the stream; ``fault`` then has the reason.

    It reports itself as not seekable, because its end is not known; :meth:`seek` still works.
    """

    def __init__(
        self, stream: BinaryIO, kind: str, reader: Callable[[Any], _Reader], digest: Digest | None = None
    ) -> None:
        self.kind = kind
        self.fault: str | None = None
        self._stream, self._start, self._reader = stream, stream.tell(), reader
        self._copy: BinaryIO | None = None
        self._begin(digest)

    def _begin(self, digest: Digest | None) -> None:
        self._stream.seek(self._start)
        self._packed = _Packed(self._stream, digest)
        self._buffered = io.BufferedReader(self._packed, _CHUNK)
        self._source: _Reader | None = None
        self._position = 0
        self.fault = None

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int) -> int:
        """Seek to ``offset`` bytes from the start."""
        if offset < self._position and self._copy is None:
            self._copy = self._copied()
        if self._copy is not None:
            self._copy.seek(offset)
            self._position = offset
        while self._position < offset and self.read(min(_CHUNK, offset - self._position)):
            pass
        return self._position

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end. Raises OSError if the compressed bytes cannot be read."""
        parts: list[bytes] = []
        while size > 0 and (data := self._some(size)):
            parts.append(data)
            size -= len(data)
            self._position += len(data)
        return b"".join(parts)

    def drain(self) -> None:
        """Read the compressed stream to its end, for the digest."""
        while self._buffered.read(_CHUNK):
            pass

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()
        self._stream.close()

    def __enter__(self) -> Unpacked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _some(self, size: int) -> bytes:
        if self._copy is not None:
            return self._copy.read(size)
        if self.fault is not None:
            return b""
        try:
            if self._source is None:
                self._source = self._reader(self._buffered)
            return self._source.read(size)
        except _damage() as error:
            if self._packed.error is not None:
                raise self._packed.error from None
            self.fault = " ".join(str(error).split()) or type(error).__name__
            return b""

    def _copied(self) -> BinaryIO:
        """A full copy in a temporary file, deleted with its last reference."""
        copy = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, prefix="capipe-")  # noqa: SIM115
        self._begin(None)
        while data := self.read(_CHUNK):
            copy.write(data)
        return cast(BinaryIO, copy)
