"""Tar files, read defensively and written reproducibly.

:func:`scan` reads a tar of any origin forward and never raises on its content: every member is returned, unusable ones
with their problem, and damage affects only the damaged part. :class:`TarWriter` writes the same bytes for the same
members at any time and on any machine.
"""

from __future__ import annotations

import hashlib
import tarfile
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from .compressed import Digest, Unpacked, unpacked

BLOCK = 512
MAX_HEADER_DATA = 1 << 20  # of an extended header (long name, pax records); real ones have a few hundred bytes
MAX_MEMBER_BYTES = 512 << 20
MAX_NAME = 1024

Wanted = bool | Callable[[str], bool]  # members whose bytes are read: all, none, or by their name

_ZERO_BLOCK = bytes(BLOCK)
_SKIP_CHUNK = 1 << 20
_SPARSE_NAME = b"GNU.sparse.name"  # `path` is then "./GNUSparseFile.<n>/<name>"
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a fifo"}


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar: ``size`` bytes of data at ``offset``. ``problem``: why it must not be used, if so.

    Offsets refer to the uncompressed tar.

    ``damaged`` distinguishes broken bytes (truncation, invalid headers) from valid entries that are refused (links,
    names).
    """

    name: str
    offset: int
    size: int
    problem: str | None = None
    damaged: bool = False
    data: bytes | None = None  # filled by scan(read_data=True) for members without a problem


class _Forward:
    """A stream read strictly forward and optionally hashed; tracks its position and, usually, its length."""

    def __init__(self, stream: BinaryIO, digest: Digest | None) -> None:
        self.unpacked = stream if isinstance(stream, Unpacked) else unpacked(stream, digest)
        self.stream = stream if self.unpacked is None else cast(BinaryIO, self.unpacked)
        self.digest, self.position = digest if self.unpacked is None else None, 0
        self.seekable = self.stream.seekable()
        self.total: int | None = None
        if self.seekable:
            start = stream.tell()
            self.total = stream.seek(0, 2) - start
            stream.seek(start)

    @property
    def fault(self) -> str | None:
        """Damage in the compression that ended the tar, if any."""
        if self.unpacked is None or self.unpacked.fault is None:
            return None
        text = f"the {self.unpacked.kind} data is damaged after {self.position} bytes of the tar"
        return f"{text} ({self.unpacked.fault}): members may be missing"

    def drain(self) -> None:
        """Read to the end of the file, for the digest."""
        if self.unpacked is not None:
            self.unpacked.drain()
        while self.digest is not None and self.read(_SKIP_CHUNK):
            pass

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        while 0 < len(data) < size:  # raw and remote streams may return less than requested before their end
            more = self.stream.read(size - len(data))
            if not more:
                break
            data += more
        self.position += len(data)
        if self.digest is not None:
            self.digest.update(data)
        return data

    def skip(self, size: int) -> int:
        """Skip bytes; returns the number skipped: fewer than ``size`` at the end of the stream."""
        if self.digest is None and self.seekable and self.total is not None:
            size = min(size, self.total - self.position)
            self.stream.seek(size, 1)
            self.position += size
            return size
        left = size
        while left and (data := self.read(min(left, _SKIP_CHUNK))):
            left -= len(data)
        return size - left


def scan(stream: BinaryIO, *, read_data: Wanted = False, digest: Digest | None = None) -> Iterator[Member]:
    """Every entry of the tar in ``stream``, compressed or not, in order; directories are skipped.

    With ``read_data`` valid members have their bytes: all, or those whose names it is true of; others are skipped.
    ``digest`` gets every byte of the file, to its end.
    After a bad header the scan continues at the next valid header block; the skipped part is one problem.
    """
    source = _Forward(stream, digest)
    ended = False  # whether the last block was the end-of-archive mark
    cut_short = False  # whether the last member claimed more bytes than available
    overrides: dict[str, str] = {}
    while header := source.read(BLOCK):
        at = source.position - len(header)
        if header == _ZERO_BLOCK:
            ended = True  # continue: concatenated tars go on after the mark
            continue
        info = _parse(header)
        if info is None:
            size, (header, skipped) = len(header), _resync(source)
            info = _parse(header)
            if info is None and cut_short:
                break  # the rest of the member just reported as truncated
            text = f"no valid tar header in {size + skipped} bytes at byte {at}"
            yield Member("", at, size + skipped, text, damaged=True)
            if info is None:
                break
        cut_short = False
        ended = False
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            problem = _read_override(source, info, overrides)
            if problem is not None:
                yield problem
            continue
        if info.isdir() or info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            source.skip(_padded(max(info.size, 0)))
            continue
        if info.type == tarfile.GNUTYPE_SPARSE:
            overrides["sparse"] = ""
            _skip_sparse_map(source, header)
        member = _take(source, info, overrides, read_data)
        cut_short = member.damaged
        yield member
        overrides = {}
    else:
        if source.fault is None and not ended and not cut_short:
            text = f"the tar ends at byte {source.position} without its end mark: members may be missing"
            yield Member("", source.position, 0, text, damaged=True)
    if source.fault is not None:
        yield Member("", source.position, 0, source.fault, damaged=True)
    source.drain()


def _parse(header: bytes) -> tarfile.TarInfo | None:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return info if info.size >= 0 else None


def _resync(source: _Forward) -> tuple[bytes, int]:
    """Search block by block for the next valid header; also returns the bytes skipped. Empty at the stream's end."""
    skipped = 0
    while block := source.read(BLOCK):
        cheap = block[257:262] == b"ustar" or len(block) < BLOCK  # invalid data may be gigabytes
        if cheap and _parse(block) is not None:
            return block, skipped
        skipped += len(block)
    return b"", skipped


def _skip_sparse_map(source: _Forward, header: bytes) -> None:
    """Skip the blocks after an old GNU sparse header: the rest of the map of holes, not included in the size."""
    more = header[482]
    while more and (block := source.read(BLOCK)):
        more = block[504] if len(block) == BLOCK else 0


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read_override(source: _Forward, info: tarfile.TarInfo, overrides: dict[str, str]) -> Member | None:
    """Read a long-name or pax header into ``overrides``; returns a problem member if it is invalid."""
    at = source.position
    if info.size > MAX_HEADER_DATA:
        return Member("", at, 0, f"extended header of {info.size} bytes at byte {at}", damaged=True)
    data = source.read(_padded(info.size))[: info.size]
    if len(data) < info.size:
        return Member("", at, 0, f"the tar ends inside an extended header at byte {at}", damaged=True)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        overrides["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return None
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data) or len(length) > 7:
            return Member("", at, 0, f"malformed pax header at byte {at}", damaged=True)
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        name, _, value = record.rstrip(b"\n").partition(b"=")
        if name in (b"path", b"size", _SPARSE_NAME):
            overrides[name.decode()] = value.decode("utf-8", "surrogateescape")
        if name.startswith(b"GNU.sparse."):
            overrides["sparse"] = ""
    return None


def _take(source: _Forward, info: tarfile.TarInfo, overrides: dict[str, str], read_data: Wanted) -> Member:
    """The member whose header was just read; leaves the source at the next header."""
    name, size = overrides.get(_SPARSE_NAME.decode(), overrides.get("path", info.name)), info.size
    if "size" in overrides:
        size = int(overrides["size"]) if overrides["size"].isdigit() and len(overrides["size"]) < 16 else -1
    offset = source.position
    shown = printable(name)
    if not info.isreg():
        kind = _KINDS.get(info.type, f"of tar type {printable(info.type.decode('latin-1'))!r}")
        source.skip(_padded(max(size, 0)) if info.type not in _KINDS else 0)
        return Member(shown, offset, 0, f"member {shown!r} is {kind}, not a file")
    if size < 0 or (source.total is not None and size > source.total - offset):
        # Not skipped: if the size is wrong, the search for a header finds the members after it.
        left = "" if source.total is None else f", {source.total - offset} are left"
        return Member(shown, offset, 0, f"member {shown!r} claims {size} bytes{left}: the tar ends early", damaged=True)
    problem = unsafe_name(name)
    if problem is None and "sparse" in overrides:  # its bytes differ from the file's: holes are omitted
        problem = f"member {shown!r} is a sparse member: pack it without --sparse"
    if problem is None and size > MAX_MEMBER_BYTES:
        problem = f"member {shown!r} has {size} bytes, over the limit of {MAX_MEMBER_BYTES}"
    if problem is not None or not (read_data(name) if callable(read_data) else read_data):
        if source.skip(_padded(size)) < size:
            return Member(shown, offset, size, f"the tar ends inside member {shown!r}", damaged=True)
        return Member(shown if problem else name, offset, size, problem)
    data = source.read(_padded(size))
    if len(data) < size:
        return Member(shown, offset, size, f"the tar ends inside member {shown!r}", damaged=True)
    return Member(name, offset, size, data=data[:size])


def unsafe_name(name: str) -> str | None:
    """Why a member's name is unsafe, or None. Nothing is extracted here, but readers of our output might."""
    shown = printable(name[:MAX_NAME])
    if any("\udc80" <= c <= "\udcff" for c in name):
        return f"member name {shown!r} is not UTF-8"
    if "\0" in name:
        return f"member name {shown!r} has a zero byte"
    if not name or name in (".", "./"):
        return "a member has an empty name"
    if len(name) > MAX_NAME:
        return f"member name of {len(name)} characters"
    if name.startswith(("/", "\\")) or name[1:3] in (":/", ":\\"):
        return f"member name {shown!r} is absolute"
    if ".." in name.replace("\\", "/").split("/"):
        return f"member name {shown!r} climbs out of its folder"
    return None


def printable(text: str) -> str:
    """``text`` with everything that is not printable UTF-8 escaped: safe for a log, a Parquet cell or a terminal."""
    if text.isprintable():  # which surrogates are not
        return text
    return "".join(c if c.isprintable() and not "\udc80" <= c <= "\udcff" else ascii(c)[1:-1] for c in text)


def without_controls(text: str) -> str:
    """``text`` with control characters and line separators escaped: safe for a key; other letters stay."""
    if text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


class TarWriter:
    """Writes members sequentially with fixed metadata, so equal input gives equal bytes; hashes while writing."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest, self.size = stream, hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Append a file; returns the byte offset of its header (for an index of the tar)."""
        at = self.size
        self._write(_header(name, len(data)))
        self._write(data)
        self._write(bytes(_padded(len(data)) - len(data)))
        return at

    def finish(self) -> str:
        """Write the end mark; returns the file's sha256 in hex. The stream stays open: the caller syncs it."""
        self._write(bytes(2 * BLOCK))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)


def written_size(name: str, size: int) -> int:
    """Bytes that :class:`TarWriter` writes for a member of ``size`` bytes."""
    return len(_header(name, size)) + _padded(size)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
