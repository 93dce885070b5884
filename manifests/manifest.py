"""The manifest: an append-only list of committed shards. A shard without a line in it does not exist.

Locally it is ``_capipe/manifest.jsonl``, one line per commit. Object stores cannot append, so there each line is an
object of its own (:mod:`.object_store.log`). The last line about a shard counts; a line with ``retracted`` takes a
shard back before it is redone.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import ArtifactMismatch
from .files import bounded_json
from .files.names import checked_name
from .files.redaction import redacted_data
from .files.storage import PRIVATE, Folder, NotAFile, append_line
from .files.tar import printable
from .fingerprint import canonical
from .object_store.commits import finish_all
from .object_store.log import OBJECTS, Entry, Log, Note, is_whole, last
from .object_store.log import parse as parse_entry
from .status import Status

LINES = f"{PRIVATE}/manifest.jsonl"
CHECKSUM = "checksum"  # key of a line: checksum over its other keys
REPLACES = "replaces"  # key of ``stats``: see ShardRecord.replaces


@dataclass(frozen=True)
class ShardRecord:
    """One committed shard.

    ``rows``: count by status. ``files``: ``{name: {"bytes": n, "sha256": hex}}``. ``input``: what it was made from,
    with at least ``digest``. ``seconds``: from first row to commit, only in lines older than :mod:`.times`.
    """

    shard: str
    rows: Mapping[str, int]
    files: Mapping[str, Mapping[str, Any]]
    input: Mapping[str, Any]
    fingerprint: str
    retracted: bool = False
    stats: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def count(self) -> int:
        return sum(self.rows.values())

    @property
    def unresolved(self) -> int:
        """Number of rows to try again."""
        return sum(count for status, count in self.rows.items() if not Status(status).resolved)

    @property
    def replaces(self) -> tuple[str, ...]:
        """sha256 of the tars and Parquets of this shard's earlier versions, before some of its rows were redone."""
        return tuple(self.stats.get(REPLACES, ()))

    @property
    def current(self) -> tuple[str, ...]:
        """sha256 of its current tar and Parquet."""
        names = (f"{self.shard}.parquet", f"{self.shard}.tar")
        return tuple(self.files[name]["sha256"] for name in names if name in self.files)

    @property
    def versions(self) -> tuple[str, ...]:
        """Both: the versions that a replacement supersedes."""
        return (*self.replaces, *self.current)

    def retraction(self) -> ShardRecord:
        """The line that retracts this shard; it records what the next version replaces."""
        return replace(self, rows={}, files={}, input={}, retracted=True, stats={REPLACES: list(self.versions)})


def read(folder: Folder, generation: str = "") -> dict[str, ShardRecord]:
    """The committed shards by name, in name order. A torn last line (a crash while appending) does not count."""
    return Manifest(folder, generation).committed()


class Manifest:
    """The manifest of a folder; what was read before is not read again, as it only grows. Thread-safe.

    An artifact copied to or from a store has both kinds of lines: those from before the copy, which are read once, and
    those committed after it. ``generation``: of the artifact in a store, see :class:`.object_store.log.Note`.
    """

    def __init__(self, folder: Folder, generation: str = "") -> None:
        self._folder, self._generation = folder, generation
        self._lock = threading.Lock()
        self._log = None if folder.is_local else Log(folder)
        self._lines = _Lines(folder)
        self._before: dict[str, ShardRecord] | None = None  # those from before a copy
        self._entries: dict[str, tuple[Entry, ShardRecord]] = {}
        self._told: set[tuple[str, str]] = set()
        self.notes: dict[str, Note] = {}  # by shard, of a store's entries

    def last_lines(self) -> dict[str, ShardRecord]:
        """The last line about each shard, in name order. Raises ArtifactMismatch for a malformed one, OSError."""
        with self._lock:
            return self._read()

    def committed(self) -> dict[str, ShardRecord]:
        """The committed shards, in name order."""
        return {shard: record for shard, record in self.last_lines().items() if not record.retracted}

    def retracted(self) -> dict[str, ShardRecord]:
        """The lines of retracted shards that are not committed again."""
        return {shard: record for shard, record in self.last_lines().items() if record.retracted}

    def news(self) -> list[ShardRecord]:
        """Commits since the last call, by any process; all of them the first time."""
        if self._log is None:
            with self._lock:
                return [record for record in self._lines.news() if not record.retracted]
        new = []
        for record in self.committed().values():
            mark = record.shard, ",".join(str(file["sha256"]) for file in record.files.values())
            if mark not in self._told:
                self._told.add(mark)
                new.append(record)
        return new

    def find(self, shard: str) -> ShardRecord | None:
        """The committed shard of this name, without a listing."""
        if self._log is None:
            return self.committed().get(shard)
        entry = last(self._folder, shard)
        if entry is None or not is_whole(entry, self._generation):
            return None
        record = of_entry(self._folder, entry)
        return None if record.retracted else record

    def finish(self) -> None:
        """Complete commits of a store that a crash interrupted, and let later readers read less. For writers."""
        if self._log is not None:
            finish_all(self._folder, self._log.read(), self._generation)
            self._log.read()
            self._log.copy()

    def _read(self) -> dict[str, ShardRecord]:
        if self._before is None:
            self._before = self._copied_before()
        newer = self._lines.read() if self._log is None else self._of_entries(self._log)
        return dict(sorted({**self._before, **newer}.items()))

    def _copied_before(self) -> dict[str, ShardRecord]:
        if self._log is not None:
            return _Lines(self._folder).read()
        entries = [
            parse_entry(self._folder, name, self._folder.read_bytes(f"{OBJECTS}/{name}"))
            for name in self._folder.names(OBJECTS)
        ]
        return self._counted(sorted(entries, key=lambda entry: (entry.shard, entry.number)))

    def _of_entries(self, log: Log) -> dict[str, ShardRecord]:
        return self._counted(log.read())

    def _counted(self, entries: Sequence[Entry]) -> dict[str, ShardRecord]:
        """The last record about each shard. One whose files are not yet at their names hides the ones before it."""
        records: dict[str, ShardRecord] = {}
        for entry in entries:
            if is_whole(entry, self._generation):
                known = self._entries.get(entry.name)
                if known is None or known[0] is not entry:
                    known = self._entries[entry.name] = entry, of_entry(self._folder, entry)
                records[entry.shard], self.notes[entry.shard] = known[1], entry.note
            elif entry.note.generation == self._generation:
                records.pop(entry.shard, None)
        return records


class _Lines:
    """``manifest.jsonl``, parsed as far as it was read; read anew if it did anything but grow."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._clear()

    def _clear(self) -> None:
        self._seen, self._stamp, self._count, self._untold = 0, (0, 0, 0), 0, 0
        self._order: list[ShardRecord] = []
        self._records: dict[str, ShardRecord] = {}

    def read(self) -> dict[str, ShardRecord]:
        """The last line about each shard."""
        lines = self._new_lines()
        for line in lines:
            self._count += 1
            try:
                record = parsed(line) if line else None
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                where = f"{self._folder.url}/{LINES}:{self._count}"
                self._clear()
                raise _malformed(where, error) from None
            if record is not None:
                self._records[record.shard] = record
                self._order.append(record)
        return self._records

    def news(self) -> list[ShardRecord]:
        """Lines since the last call."""
        self.read()
        new, self._order = self._order, []
        return new

    def _new_lines(self) -> list[bytes]:
        """Whole lines after those seen; after the last newline is nothing, or a torn line."""
        folder = self._folder
        if not folder.is_local:
            return folder.read_bytes(LINES).split(b"\n")[:-1] if folder.exists(LINES) else []
        try:
            with folder.open(LINES) as file:
                status = os.fstat(file.fileno())
                stamp = status.st_ino, status.st_size, status.st_mtime_ns
                if stamp == self._stamp:
                    return []
                if stamp[0] != self._stamp[0] or status.st_size <= self._stamp[1]:
                    self._clear()
                file.seek(self._seen)
                data = file.read()
        except FileNotFoundError:
            self._clear()
            return []
        except NotAFile as error:
            raise ArtifactMismatch(f"{folder.url}/{LINES}: {error.strerror}; restore it, or clear the folder") from None
        whole = data[: data.rfind(b"\n") + 1]
        self._seen, self._stamp = self._seen + len(whole), stamp
        return whole.split(b"\n")[:-1]


def of_entry(folder: Folder, entry: Entry) -> ShardRecord:
    """The record of a store's entry. Raises ArtifactMismatch."""
    try:
        record = parsed(entry.line)
        if record.shard != entry.shard:
            raise ValueError(f"it is about shard {printable(record.shard)}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _malformed(f"{folder.url}/{entry.name}", error) from None
    return record


def _malformed(where: str, error: Exception) -> ArtifactMismatch:
    return ArtifactMismatch(f"{where}: not a manifest line ({error}); was it edited? Restore it, or clear the folder")


def written(record: ShardRecord) -> bytes:
    """A line of the manifest, without its newline."""
    entry = {k: v for k, v in asdict(record).items() if v or k not in ("retracted", "seconds")}
    entry["input"] = redacted_data(entry["input"])
    return canonical({**entry, CHECKSUM: _checksum(entry)}).encode()


def parsed(line: bytes) -> ShardRecord:
    """Raises ValueError, TypeError or KeyError if the line is not as it was written. Older lines have no checksum."""
    entry = bounded_json.parse(line)
    checksum = entry.pop(CHECKSUM, None)
    if checksum not in (None, _checksum(entry)):
        raise ValueError("its checksum does not fit")
    return record_of(entry)


def record_of(entry: Mapping[str, Any]) -> ShardRecord:
    """A shard's line, without its checksum. Raises ValueError, TypeError or KeyError if it is malformed, or if a shard
    or file name leads out of the artifact."""
    record = ShardRecord(**entry)
    _check(record)
    return record


def _checksum(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(entry).encode()).hexdigest()[:16]


def _check(record: ShardRecord) -> None:
    if "/" in checked_name(record.shard):
        raise ValueError(f"the shard's name {record.shard!r} has a folder in it")
    if not all(isinstance(value, dict) for value in (record.rows, record.files, record.input, record.stats)):
        raise TypeError("rows, files, input or stats are no objects")
    record.unresolved  # noqa: B018  (raises on an unknown status)
    check_files(record.files)
    if not all(type(count) is int and count >= 0 for count in record.rows.values()):
        raise TypeError("rows are no numbers")
    for shard in made_of(record):
        checked_name(shard["name"])
        if not record.retracted and not isinstance(shard["digest"], str):
            raise TypeError("the digest of what it was made of is no text")
    if not all(isinstance(value, str) for value in (record.fingerprint, *record.replaces)):
        raise TypeError("the fingerprint, or what the shard replaces, is no text")
    if not record.retracted and not (
        isinstance(record.input["digest"], str) and f"{record.shard}.parquet" in record.files
    ):
        raise ValueError("its input has no digest, or its files no Parquet")


def check_files(files: Mapping[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError if a list of files, with size and hash, is malformed."""
    for name, file in files.items():
        checked_name(name)
        if not (type(file["bytes"]) is int and file["bytes"] >= 0 and isinstance(file["sha256"], str)):
            raise TypeError(f"{name}: bytes are no number, or the sha256 no text")


def made_of(record: ShardRecord) -> list[Mapping[str, Any]]:
    """Entries of a line for its input shards: one, several, or ranges of rows."""
    entries: list[Mapping[str, Any]] = record.input.get("shards") or [{**record.input, "name": record.shard}]
    return entries


def append(folder: Folder, record: ShardRecord) -> None:
    """Commit in a local folder: from the moment this returns the shard exists."""
    append_line(folder.to_write(LINES), written(record), durable=True)
