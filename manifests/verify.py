"""Verification of an artifact's guarantees against its bytes."""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import pyarrow as pa

from ..errors import ArtifactMismatch, CapipeError
from .artifact import CONFIG, Artifact
from .artifact_spec import ArtifactSpec
from .files import bounded_json
from .files.allowed import Allowed
from .files.names import checked_name
from .files.outside import Refused
from .files.storage import Folder
from .files.store_errors import StoreUnavailable
from .manifest import ShardRecord, made_of
from .samples import Sample, read_samples
from .schema import SOURCE_UID, check
from .shards import ROWS, SizedDigest, uid_of
from .status import Status
from .withdrawal.applied import encodes_anew

_UNKNOWN = ArtifactSpec("", "")
NO_SPECS: Mapping[str, ArtifactSpec] = {}
_CHUNK = 1 << 20
_ROW = ("key", "uid", "status")


@dataclass
class VerifyReport:
    """What was read, and every fault, one line each; without faults the artifact is valid."""

    shards: int = 0
    bytes: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(url: str, images: Sequence[str] = (), specs: Mapping[str, ArtifactSpec] = NO_SPECS) -> VerifyReport:
    """Re-read an artifact: checksums, sizes, schemas, counts, keys, tars against Parquets, rows against its input.

    ``images``: folders and URLs below which its input may be read, if it is in another store. ``specs``: artifact specs
    by stage; for any other stage, rows must match the input and extra columns are not checked.
    """
    artifact = Artifact.open(url)
    if not artifact.folder.is_local:
        artifact = replace(artifact, folder=_ReadOnce(artifact.folder))
    spec = specs.get(artifact.stage, _UNKNOWN)
    report = VerifyReport()
    keys = _KeySet()
    if not artifact.is_as_written:
        report.faults.append(f"{url}/{CONFIG}: its digest does not fit its contents; was it edited? Restore it")
    source = _source(artifact, report, Allowed(url, tuple(images)))
    before = {} if source is None else source.committed()
    replaced = {shard: {*record.replaces} - {*record.current} for shard, record in before.items()}
    records = artifact.committed()
    for record in records.values():
        report.shards += 1
        report.rows.update(record.rows)
        if isinstance(artifact.folder, _ReadOnce):
            artifact.folder.keep(record)
        tar = f"{record.shard}.tar"
        faults = list(_files(artifact, {name: file for name, file in record.files.items() if name != tar}, report))
        if not faults:
            faults = list(_readable(artifact, record, spec))
        rows = None if faults else artifact.table(record.shard, _ROW).to_pylist()
        if tar in record.files:
            faults += _tar(artifact, record, rows, report)
        if rows is not None:
            faults += _content(artifact, record, rows)
            _unique_keys(artifact, record, spec, keys, report)
            if any(_is_older(entry, replaced) for entry in made_of(record)):
                text = "rows of its input were done again since; its command does these again, too"
                report.notes.append(f"{artifact.url}/{record.shard}.parquet: {text}")
            else:
                faults += _conservation(artifact, record, spec, source)
        report.faults += [f"{artifact.url}/{fault}" for fault in faults]
    report.faults += [f"{artifact.url}/{fault}" for fault in _finals(artifact, report)]
    _leftovers(artifact, records, report)
    return report


class _ReadOnce(Folder):
    """A store's folder in which a shard's files, other than its tar, are read once and kept until the next shard."""

    def __init__(self, folder: Folder) -> None:
        self.__dict__.update(folder.__dict__)
        self._kept: dict[str, bytes | None] = {}

    def keep(self, record: ShardRecord) -> None:
        self._kept = {name: None for name in record.files if not name.endswith(".tar")}

    def read_bytes(self, name: str) -> bytes:
        data = self._kept.get(name)
        if data is None:
            data = super().read_bytes(name)
            if name in self._kept:
                self._kept[name] = data
        return data

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read_bytes(name)) if name in self._kept else super().open(name)

    def size(self, name: str) -> int:
        data = self._kept.get(name)
        return super().size(name) if data is None else len(data)


class _KeySet:
    """Set of keys, 8 bytes each: an artifact's keys may not fit into memory as strings."""

    def __init__(self) -> None:
        self._marks: set[int] = set()

    def add(self, key: str) -> bool:
        """Add ``key``; returns True if it is new."""
        mark = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        before = len(self._marks)
        self._marks.add(mark)
        return len(self._marks) > before


def _files(artifact: Artifact, files: Mapping[str, Mapping[str, Any]], report: VerifyReport) -> Iterator[str]:
    for name, expected in files.items():
        read = SizedDigest()
        try:
            if fault := _size(artifact, name, expected):
                yield fault
                continue
            with artifact.folder.open(name) as file:
                while data := file.read(_CHUNK):
                    read.update(data)
        except FileNotFoundError:
            yield f"{name}: missing, though its shard is committed"
            continue
        except StoreUnavailable:
            raise
        except OSError as error:
            yield f"{name}: cannot be read ({error})"
            continue
        report.bytes += read.size
        yield from _bytes(name, read, expected)


def _size(artifact: Artifact, name: str, expected: Mapping[str, Any]) -> str | None:
    """The fault of a file of another size, which is not read: it may be a terabyte of holes."""
    actual = artifact.folder.size(name)
    return None if actual == expected["bytes"] else f"{name}: {actual} bytes, {expected['bytes']} were committed"


def _bytes(name: str, read: SizedDigest, expected: Mapping[str, Any]) -> Iterator[str]:
    """Faults unless a file has the committed bytes."""
    if read.size != expected["bytes"] or read.hexdigest() != expected["sha256"]:
        yield f"{name}: its sha256 is not the one that was committed"


def _finals(artifact: Artifact, report: VerifyReport) -> Iterator[str]:
    """Faults in the files over all shards of an export."""
    if "extras" not in artifact.config["run"]:
        return
    finals = artifact.config["run"].get("finals")
    if finals is None:
        report.notes.append(f"{artifact.url}: its card and indexes are not written yet; run the same command again")
    yield from _files(artifact, finals or {}, report)


def _unique_keys(
    artifact: Artifact, record: ShardRecord, spec: ArtifactSpec, keys: _KeySet, report: VerifyReport
) -> None:
    """Keys assigned by ingest are unique in the artifact. Tars of other tools may repeat a key in another tar; final
    shards, whose rows are compared with their input below, may inherit that through several stages."""
    column = artifact.table(record.shard, ["key"]).column("key").to_pylist()
    repeated = [key for key in column if not keys.add(key)]
    if not repeated:
        return
    text = f"{record.shard}.parquet: key {repeated[0]!r} is not unique in the artifact ({len(repeated)} such)"
    passed_on = artifact.config["semantic"].get("input", "") is None or spec.source_key is not None
    if passed_on and len(set(column)) == len(column):
        report.notes.append(f"{artifact.url}/{text}: its tars came from elsewhere; join by shard and key, or by uid")
    else:
        report.faults.append(f"{artifact.url}/{text}")


def _readable(artifact: Artifact, record: ShardRecord, spec: ArtifactSpec) -> Iterator[str]:
    """Reasons not to read a shard's Parquet: rows other than the manifest's, or a wrong schema for its stage."""
    name = f"{record.shard}.parquet"
    try:
        with artifact.parquet(record.shard) as parquet:
            if spec.schema is not None:
                check(parquet.schema_arrow, spec.schema, name)
            missing = {*_ROW} - {*parquet.schema_arrow.names}
    except ArtifactMismatch as error:
        yield str(error).removeprefix(f"{artifact.url}/")
    except CapipeError as error:
        yield str(error)
    except (OSError, pa.ArrowException) as error:
        yield f"{name}: cannot be read ({error})"
    else:
        yield from (f"{name}: has no column {column}" for column in sorted(missing))


def _content(artifact: Artifact, record: ShardRecord, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    name = f"{record.shard}.parquet"
    counts = Counter(row["status"] for row in rows)
    if counts != Counter(record.rows):
        yield f"{name}: rows by status {dict(counts)}, the manifest says {dict(record.rows)}"
    yield from _stats(artifact, f"{record.shard}_stats.json", counts)
    loose = f"_capipe/parts/{record.shard}.jsonl"
    if loose in record.files:
        yield from _loose_images(artifact, loose, {row["key"]: row["uid"] for row in rows})


def _stats(artifact: Artifact, name: str, counts: Counter[str]) -> Iterator[str]:
    try:
        stats = bounded_json.load_from(artifact.folder, name)
        sound = stats["count"] == counts.total() and stats["successes"] == counts[Status.OK]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{name}: cannot be read ({error})"
        return
    if not sound:
        yield f"{name}: its counts are not those of the Parquet"


def _tar(
    artifact: Artifact, record: ShardRecord, rows: Sequence[Mapping[str, Any]] | None, report: VerifyReport
) -> list[str]:
    """Faults of a tar, which is read once. ``rows``: of its Parquet, if that is sound; else only its bytes count."""
    name, read = f"{record.shard}.tar", SizedDigest()
    faults: list[str] = []
    try:
        if fault := _size(artifact, name, record.files[name]):
            return [fault]
        with artifact.folder.open(name) as stream:
            if rows is None:
                while data := stream.read(_CHUNK):
                    read.update(data)
            else:
                samples = read_samples(stream, digest=read)
                faults += _samples(name, samples, [row for row in rows if row["status"] == Status.OK])
                collections.deque(samples, maxlen=0)  # to its end, for the checksum
    except FileNotFoundError:
        return [f"{name}: missing, though its shard is committed"]
    except StoreUnavailable:
        raise
    except OSError as error:
        return [f"{name}: cannot be read ({error})"]
    report.bytes += read.size
    return list(_bytes(name, read, record.files[name])) or faults


def _samples(name: str, samples: Iterator[Sample], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Faults unless a tar has exactly the ok rows, in order, with the same members, each image matching its uid."""
    shapes = set()
    for sample, row in itertools.zip_longest(samples, rows):
        if sample is None or row is None or sample.key != row["key"]:
            actual, wanted = sample and sample.key, row and row["key"]
            yield f"{name}: holds {actual!r} where the Parquet has {wanted!r}"
            return
        image = sample.image()
        if image is None or image.data is None or uid_of(image.data) != row["uid"]:
            yield f"{name}: the image of {sample.key!r} is not that of its uid ({sample.error or 'other bytes'})"
        shapes.add(frozenset(ext for ext, member in sample.members.items() if member is not image))
    if len(shapes) > 1:
        yield f"{name}: samples differ in their members {sorted(sorted(s) for s in shapes)}"


def _loose_images(artifact: Artifact, part: str, uids: Mapping[str, str]) -> Iterator[str]:
    """Faults unless each image in an export's list exists and matches its uid, and likewise its caption file."""
    with artifact.folder.open(part) as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = bounded_json.parse(line)
                image = checked_name(entry.get("image") or entry.get("file_name") or entry["images"][0])
                key, caption = entry.get("id") or entry["key"], str(entry.get("text"))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                yield f"{part}: line {number} names no image ({error})"
                continue
            try:
                sound = uid_of(artifact.folder.read_bytes(image)) == uids.get(key)
            except OSError as error:
                yield f"{image}: cannot be read ({error})"
                continue
            if not sound:
                yield f"{image}: not the image of its uid"
            if "file_name" in entry:
                yield from _loose_caption(artifact, f"{image.rpartition('.')[0]}.txt", caption)


def _loose_caption(artifact: Artifact, name: str, caption: str) -> Iterator[str]:
    try:
        sound = artifact.folder.read_bytes(name) == caption.encode()
    except OSError as error:
        yield f"{name}: cannot be read ({error})"
        return
    if not sound:
        yield f"{name}: not the caption that was written"


def _source(artifact: Artifact, report: VerifyReport, allowed: Allowed) -> Artifact | None:
    """The artifact this one was made from, if it was one of ours and still exists at its place."""
    pattern = artifact.config["run"].get("shards")
    if artifact.config["semantic"].get("input") is None or not isinstance(pattern, str):
        return None
    try:
        source = Artifact.open(allowed.place(pattern))
    except (CapipeError, Refused, OSError) as error:
        report.notes.append(f"rows were not compared with its input ({error})")
        return None
    if source.fingerprint != artifact.config["semantic"]["input"]:
        report.notes.append(f"its input {pattern} is another one by now: rows were not compared with it")
        return None
    return source


def _conservation(
    artifact: Artifact, record: ShardRecord, spec: ArtifactSpec, source: Artifact | None
) -> Iterator[str]:
    if source is None:
        return
    name = f"{record.shard}.parquet"
    try:
        ours = _identity(
            artifact, record.shard, spec.source_key or "key", SOURCE_UID if encodes_anew(artifact) else "uid"
        )
        theirs = pa.concat_tables(_rows_of(source, entry) for entry in made_of(record))
    except (CapipeError, OSError, KeyError, pa.ArrowException) as error:
        yield f"{name}: cannot be compared with its input {source.url} ({error})"
        return
    if not ours.equals(theirs):
        yield f"{name}: keys and uids are not those of its input {source.url}, row by row"


def _rows_of(source: Artifact, entry: Mapping[str, Any]) -> pa.Table:
    """Keys and uids of one input shard's rows that went into a shard."""
    table = _identity(source, entry["name"], "key")
    start = entry.get("from", 0)
    return table.slice(start, entry.get("to", len(table)) - start)


def _is_older(entry: Mapping[str, Any], replaced: Mapping[str, set[str]]) -> bool:
    """True if an input shard was ``replaced`` by another version since."""
    return bool({entry["digest"], entry.get(ROWS)} & replaced.get(entry["name"], set()))


def _identity(artifact: Artifact, shard: str, key: str, uid: str = "uid") -> pa.Table:
    """Keys and uids of a shard's rows, from columns of these names."""
    table = artifact.table(shard, [key, uid])
    return pa.table({"key": table.column(key), "uid": table.column(uid)})


def _leftovers(artifact: Artifact, records: Mapping[str, ShardRecord], report: VerifyReport) -> None:
    scratch = artifact.folder.private("tmp")
    for path in sorted(scratch.glob("*")) if scratch.is_dir() else []:
        report.faults.append(f"{path}: a temporary file was left behind; run the same command again to clear it")
    known = {name for record in records.values() for name in record.files}
    for name in artifact.folder.names():
        if name.endswith((".tar", ".parquet", "_stats.json")) and name not in known:
            report.notes.append(f"{artifact.url}/{name}: of a shard that is not committed; the next run replaces it")
    journals = artifact.folder.private("journal")
    if journals.is_dir() and any(journals.iterdir()):
        report.notes.append(f"{artifact.url}: unfinished shards have journals; run the same command to finish them")
    for shard, reason in artifact.quarantined().items():
        report.notes.append(f"{artifact.url}: shard {shard} is quarantined ({reason})")
