"""The manifest: an append-only list of committed shards. A shard without a line in it does not exist.

Locally it is ``_capipe/manifest.jsonl``, one line per commit. Object stores cannot append, so there each line is an
object of its own in ``_capipe/manifest.d/``. The last line about a shard counts; a line with ``retracted`` takes a
shard back before it is redone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import ArtifactMismatch
from .files import bounded_json
from .files.names import checked_name
from .files.redaction import redacted_data
from .files.storage import PRIVATE, Folder, NotAFile, append_line
from .fingerprint import canonical
from .status import Status

LINES = f"{PRIVATE}/manifest.jsonl"
OBJECTS = f"{PRIVATE}/manifest.d"
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


def read(folder: Folder) -> dict[str, ShardRecord]:
    """The committed shards by name, in name order. A torn last line (a crash while appending) does not count."""
    return {shard: record for shard, record in _last_lines(folder).items() if not record.retracted}


def retracted(folder: Folder) -> dict[str, ShardRecord]:
    """The lines of retracted shards that are not committed again, by name."""
    return {shard: record for shard, record in _last_lines(folder).items() if record.retracted}


def _last_lines(folder: Folder) -> dict[str, ShardRecord]:
    records: dict[str, ShardRecord] = {}
    for where, line in _lines(folder):
        try:
            record = _parsed(line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            text = (
                f"{folder.url}/{where}: not a manifest line ({error}); was it edited? Restore it, or clear the folder"
            )
            raise ArtifactMismatch(text) from None
        records[record.shard] = record
    return dict(sorted(records.items()))


def _written(record: ShardRecord) -> bytes:
    """A line of the manifest, without its newline."""
    entry = {k: v for k, v in asdict(record).items() if v or k not in ("retracted", "seconds")}
    entry["input"] = redacted_data(entry["input"])
    return canonical({**entry, CHECKSUM: _checksum(entry)}).encode()


def _parsed(line: bytes) -> ShardRecord:
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


def _lines(folder: Folder) -> list[tuple[str, bytes]]:
    """All lines, the newest last. An artifact copied to or from a store has both kinds: those from before the copy, and
    those committed after it."""
    objects = [(f"{OBJECTS}/{name}", folder.read_bytes(f"{OBJECTS}/{name}")) for name in folder.names(OBJECTS)]
    if not folder.exists(LINES):
        return objects
    try:
        lines = folder.read_bytes(LINES).split(b"\n")[:-1]  # after the last newline: empty, or a torn line
    except NotAFile as error:
        raise ArtifactMismatch(f"{folder.url}/{LINES}: {error.strerror}; restore it, or clear the folder") from None
    numbered = [(f"{LINES}:{number}", line) for number, line in enumerate(lines, 1) if line]
    return objects + numbered if folder.is_local else numbered + objects


class Tail:
    """Commits since the last call, by any process; for local folders, whose manifest only grows."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._seen = folder, 0

    def news(self) -> list[ShardRecord]:
        path = self._folder.local(LINES)
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._seen)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._seen += len(whole)
        return [_parsed(line) for line in whole.splitlines()]


def append(folder: Folder, record: ShardRecord) -> None:
    """Commit: from the moment this returns the shard exists."""
    line = _written(record)
    if not folder.is_local:
        folder.write(f"{OBJECTS}/{record.shard}.json", line)
        return
    append_line(folder.to_write(LINES), line, durable=True)
