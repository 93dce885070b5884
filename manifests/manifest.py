"""The manifest: an append-only list of committed shards. A shard without a line in it does not exist.

Locally it is ``_capipe/manifest.jsonl``, one line per commit. Object stores cannot append, so there each line is an
object of its own (:mod:`.object_store.log`). The last line about a shard counts; a line with ``retracted`` takes a
shard back before it is redone.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

from ..errors import ArtifactMismatch
from .files import bounded_json
from .files.growing_lines import GrowingLines, collector_paused
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

    @property
    def entry(self) -> dict[str, Any]:
        """Its fields by name, not copied."""
        return dict(vars(self))

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
        self._lines = _lines_of(folder)
        self._seen_lines = (0, 0)  # a reading of the lines, and how many of them :meth:`news` has returned
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
                new, self._seen_lines = self._lines.since(*self._seen_lines)
            last_lines = {record.shard: record for record in new}
            return [record for record in last_lines.values() if not record.retracted]
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
            with self._lock:
                record = self._lines.find(shard) or self._older().get(shard)
            return None if record is None or record.retracted else record
        entry = last(self._folder, shard)
        if entry is None or not is_whole(entry, self._generation):
            return None
        record = of_entry(self._folder, entry)
        return None if record.retracted else record

    def latest(self, count: int) -> list[ShardRecord]:
        """Up to ``count`` shards committed last, oldest first. For a local folder."""
        with self._lock:
            return self._lines.latest(count)

    def finish(self) -> None:
        """Complete commits of a store that a crash interrupted, and let later readers read less. For writers."""
        if self._log is not None:
            finish_all(self._folder, self._log.read(), self._generation)
            self._log.read()
            self._log.copy()

    def _read(self) -> dict[str, ShardRecord]:
        before = self._older()
        if self._log is None:
            newer = self._lines.by_name()
            return dict(newer) if not before else _in_order({**before, **newer})
        return _in_order({**before, **self._of_entries(self._log)})

    def _older(self) -> dict[str, ShardRecord]:
        if self._before is None:
            self._before = self._copied_before()
        return self._before

    def _copied_before(self) -> dict[str, ShardRecord]:
        if self._log is not None:
            return dict(_Lines(self._folder).by_name())
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
    """``manifest.jsonl``, parsed as far as it was read; read anew if it did anything but grow. Thread-safe."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        self._file = GrowingLines(folder, LINES)
        self._reading = 0  # how often it was begun anew
        self._clear()

    def _clear(self) -> None:
        self._count = 0
        self._reading += 1
        self._order: list[ShardRecord] = []
        self._records: dict[str, ShardRecord] = {}
        self._sorted: dict[str, ShardRecord] | None = None

    def by_name(self) -> Mapping[str, ShardRecord]:
        """The last line about each shard, in name order."""
        with self._lock:
            self._read()
            if self._sorted is None:
                self._sorted = _in_order(self._records)
            return self._sorted

    def find(self, shard: str) -> ShardRecord | None:
        """The last line about a shard."""
        with self._lock:
            self._read()
            return self._records.get(shard)

    def latest(self, count: int) -> list[ShardRecord]:
        """The newest ``count`` committed shards in the order of their lines."""
        with self._lock:
            self._read()
            newest: dict[str, ShardRecord] = {}
            for record in reversed(self._order):
                if len(newest) == count:
                    break
                if self._records[record.shard] is record and not record.retracted:
                    newest[record.shard] = record
            return list(newest.values())[::-1]

    def since(self, reading: int, count: int) -> tuple[list[ShardRecord], tuple[int, int]]:
        """Lines after the first ``count`` of a reading, and both numbers of now."""
        with self._lock:
            self._read()
            new = self._order[count if reading == self._reading else 0 :]
            return new, (self._reading, len(self._order))

    def _read(self) -> None:
        try:
            lines, anew = self._file.read()
        except NotAFile as error:
            where = f"{self._folder.url}/{LINES}"
            raise ArtifactMismatch(f"{where}: {error.strerror}; restore it, or clear the folder") from None
        if anew:
            self._clear()
        with collector_paused():
            self._add(lines)

    def _add(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self._count += 1
            try:
                record = parsed(line) if line else None
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                where = f"{self._folder.url}/{LINES}:{self._count}"
                self._clear()
                self._file.forget()
                raise _malformed(where, error) from None
            if record is not None:
                self._records[record.shard] = record
                self._order.append(record)
                self._sorted = None


#: What the artifacts open in this process have read, so that two of one folder read its lines once.
_READ: WeakValueDictionary[str, _Lines] = WeakValueDictionary()
_READ_LOCK = threading.Lock()


def _lines_of(folder: Folder) -> _Lines:
    if not folder.is_local:
        return _Lines(folder)
    with _READ_LOCK:
        lines = _READ.get(folder.path)
        if lines is None:
            lines = _READ[folder.path] = _Lines(folder)
        return lines


def _in_order(records: Mapping[str, ShardRecord]) -> dict[str, ShardRecord]:
    return {name: records[name] for name in sorted(records)}  # by items would make as many tuples, and garbage of them


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
    entry = {k: v for k, v in record.entry.items() if v or k not in ("retracted", "seconds")}
    entry["input"] = redacted_data(entry["input"])
    return canonical({**entry, CHECKSUM: _checksum(entry)}).encode()


def parsed(line: bytes) -> ShardRecord:
    """Raises ValueError, TypeError or KeyError if the line is not as it was written. Older lines have no checksum."""
    entry = bounded_json.parse(line)
    checksum = entry.pop(CHECKSUM, None)
    if checksum is not None and not is_as_written(line, checksum) and checksum != _checksum(entry):
        raise ValueError("its checksum does not fit")
    return record_of(entry)


def is_as_written(line: bytes, checksum: object) -> bool:
    """True if a line's bytes are those of :func:`written` with this checksum, which is its first key; that the checksum
    fits is then known without writing its values again. The slow twin is :func:`_checksum`."""
    head = f'{{"{CHECKSUM}":"{checksum}",'.encode(errors="replace")
    if not line.startswith(head) or b"NaN" in line or b"Infinity" in line:  # which no line of ours has
        return False
    return _short(b"{" + line[len(head) :]) == checksum


def record_of(entry: Mapping[str, Any]) -> ShardRecord:
    """A shard's line, without its checksum. Raises ValueError, TypeError or KeyError if it is malformed, or if a shard
    or file name leads out of the artifact."""
    record = ShardRecord(**entry)
    _check(record)
    return record


def _checksum(entry: Mapping[str, Any]) -> str:
    return _short(canonical(entry).encode())


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def digest_of(records: Iterable[ShardRecord]) -> str:
    """sha256 over records without their times, as of the canonical JSON of their list."""
    digest, before = hashlib.sha256(b"["), b""
    for record in records:
        digest.update(before + canonical({**record.entry, "seconds": None}).encode())
        before = b","
    digest.update(b"]")
    return digest.hexdigest()


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
