"""Journal of the finished rows of an uncommitted shard: a crash costs only seconds of engine time.

One line per row, ``crc32 json``, appended as rows finish and deleted at commit. A line cut short by a crash fails its
checksum and is dropped; so is any edited line. Appends reach the operating system at once (a killed process loses
nothing) and the disk once a second (a power loss costs a second).

Opening an existing journal copies it and replaces the original: an earlier writer, presumed dead but only slow, then
appends to an unlinked file, and the two do not overwrite each other.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

from .files.redaction import redacted_row
from .files.storage import open_own
from .fingerprint import canonical

SYNC_SECONDS = 1.0


class Journal:
    """The journal of one shard. ``rows``: rows finished by earlier runs, by input row index."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Read the existing file; rows of another configuration (by ``fingerprint``) are discarded with their file."""
        self.path, self.fingerprint = path, fingerprint
        self.rows: dict[int, dict[str, Any]] = {}
        self._synced = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        sound = self._read(data)
        new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")
        self._handle = open_own(new, os.O_RDWR | os.O_EXCL)
        try:
            if sound == 0:
                self._write({"fingerprint": fingerprint})
            else:  # without a torn last line, which would make the next line unreadable, too
                self._write_all(memoryview(data)[:sound])
                os.fdatasync(self._handle)
            new.replace(path)
        except OSError:  # a full disk: the existing file stays
            self.close()
            new.unlink(missing_ok=True)
            raise

    def _read(self, data: bytes) -> int:
        """Fill ``rows``; returns the length of the valid prefix in bytes."""
        sound = 0
        for line in data.splitlines(keepends=True):
            checksum, _, body = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != _checksum(body):
                break
            try:
                entry = json.loads(body)
                if sound == 0 and entry.get("fingerprint") != self.fingerprint:
                    return 0
                if "index" in entry:
                    self.rows[entry["index"]] = entry["row"]
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                break  # not one of our lines, despite its checksum: the rows from here on are redone
            sound += len(line)
        return sound

    def append(self, index: int, row: dict[str, Any]) -> None:
        """Record that input row ``index`` became ``row`` (a JSON-able dict)."""
        self._write({"index": index, "row": redacted_row(row)})
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fdatasync(self._handle)
            self._synced = time.monotonic()

    def _write(self, entry: dict[str, Any]) -> None:
        body = canonical(entry).encode()
        self._write_all(memoryview(_checksum(body) + b" " + body + b"\n"))

    def _write_all(self, data: memoryview) -> None:
        while data:  # a nearly full disk writes part of it, then raises ENOSPC
            data = data[os.write(self._handle, data) :]

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def delete(self) -> None:
        """Close and remove the file: the shard is committed."""
        self.close()
        self.path.unlink(missing_ok=True)


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)
