"""Proof that withdrawn images are gone from a folder: every file in it is read once, whatever lists it.

Files are told by their first bytes, those of Lance by their last, not by their names. Of a tar every member is hashed,
of a Parquet or Lance file every row with a uid and every embedded image, of any other file all bytes. What belongs to a
withdrawn row without being its image is found by its key: members of a tar and lines of an export beside the shard's
Parquet.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import BadInput, CapipeError
from ..artifact import CONFIG, Artifact
from ..files import bounded_json
from ..files.compressed import tar_stem
from ..files.storage import PRIVATE, Folder, parquet_file
from ..files.store_errors import StoreUnavailable
from ..files.tar import BLOCK, Member, printable, scan
from ..joining.packed_uids import DIGITS
from ..replacing import REDO
from ..samples import split_name
from ..schema import SOURCE_UID
from ..shards import uid_of
from ..status import Status
from .applied import NOTE
from .rows import KEPT
from .uid_set import UidSet

MOST_FAULTS = 20  # lines; the others are counted
_CHUNK = 1 << 20
_ROWS, _IMAGES = 10_000, 100  # rows of a Parquet file held at a time; those with embedded images
_PARTS, _REDO = f"{PRIVATE}/parts/", f"/{PRIVATE}/{REDO}/"
_KEYS = ("key", "uid")
_LANCE, _VERSION = b"LANC", ".manifest"  # last bytes of Lance's files, also of a table's versions, which hold no row
_UIDS = ("uid", SOURCE_UID)  # the second of exports that encoded images anew


@dataclass
class AbsentReport:
    """``rows``: withdrawn rows of listed uids; ``faults``: what is there of them, or unreadable, one line each."""

    files: int = 0
    bytes: int = 0
    rows: int = 0
    faults: list[str] = field(default_factory=list)
    more: int = 0  # faults beyond the listed ones

    def add(self, faults: Iterable[str]) -> None:
        for fault in faults:
            if len(self.faults) < MOST_FAULTS:
                self.faults.append(fault)
            else:
                self.more += 1


def prove_absent(url: str, uids: UidSet) -> AbsentReport:
    """Read every file below a folder of any kind: an artifact of ours, finished or not, or other tools' tars.

    Memory: that of the list, and of one member of a tar, or of some rows of a Parquet file, at a time. Raises
    BadInput if there is no folder.
    """
    folder, report = Folder(url), AbsentReport()
    if not folder.fs.isdir(folder.path):
        raise BadInput(f"{url}: no such folder; --absent looks into an export, or any other folder of shards")
    for name in _files(folder, report):
        report.files += 1
        try:
            faults = _File(folder, name, uids, report).faults()
            report.add(f"{folder.url}/{name}: {fault}" for fault in faults)
        except StoreUnavailable:
            raise
        except (CapipeError, OSError, pa.ArrowException, ValueError) as error:
            report.add([f"{folder.url}/{name}: cannot be read ({error}), so it may hold any of them"])
    return report


def _files(folder: Folder, report: AbsentReport) -> Iterator[str]:
    """All files below a folder, by relative name, in order. Linked folders are not followed, which is a fault."""
    root = folder.path.rstrip("/") + "/"
    if not folder.is_local:
        yield from (path.removeprefix(root) for path in sorted(folder.fs.find(folder.path)))
        return
    for place, folders, names in os.walk(folder.path):
        folders.sort()
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        report.add(f"{place}/{name}: a link to a folder, which is not followed; look there, too" for name in links)
        for name in sorted(names):
            yield f"{place}/{name}".removeprefix(root)


def _unfinished(artifact: Artifact) -> Iterator[str]:
    """Faults of an artifact whose last command has something left to do: its files over all shards are older."""
    run, again = artifact.config["run"], "run the command that writes it to its end"
    note = run.get(NOTE)
    if isinstance(note, dict) and note.get("checked") is not True:
        yield f"a withdrawal was begun there and is not finished; {again}"
    if "extras" in run and run.get("finals") is None:
        yield f"its card and lists are not written yet; {again}"


class _File:
    """One file of a folder."""

    def __init__(self, folder: Folder, name: str, uids: UidSet, report: AbsentReport) -> None:
        self.folder, self.name, self.uids, self.report = folder, name, uids, report

    def faults(self) -> Iterator[str]:
        with self.folder.open(self.name) as stream:
            head = stream.read(BLOCK)
            self.report.bytes += self.folder.size(self.name)
            if self._is_lance(stream, head):
                yield from self._of_lance(stream)
            elif head[257:262] == b"ustar" or tar_stem(self.name) is not None:
                stream.seek(0)
                yield from self._of_tar(stream)
            elif not head.startswith(b"PAR1"):
                yield from self._of_bytes(head, stream)
        if head.startswith(b"PAR1"):
            with parquet_file(self.folder, self.name) as parquet:
                yield from self._of_parquet(parquet)
        elif head.startswith(b"\x93NUMPY"):
            yield from self._of_array()
        elif self.name.endswith(".jsonl"):
            place, parts, shard = self.name.removesuffix(".jsonl").rpartition(_PARTS)
            yield from self._of_lines(self._withdrawn_keys(place + shard) if parts else frozenset())
        elif self.name == CONFIG or self.name.endswith(f"/{CONFIG}"):
            yield from _unfinished(Artifact.open(f"{self.folder.url}/{self.name}".removesuffix(f"/{CONFIG}")))
        if _REDO in f"/{self.name}":
            yield "is of a shard that is half replaced; run the command that writes it to its end"

    def _of_tar(self, stream: BinaryIO) -> Iterator[str]:
        keys = self._withdrawn_keys(tar_stem(self.name) or "")
        for member in scan(stream, read_data=True):
            key = split_name(member.name.removeprefix("./"))[0]
            if key in keys:
                yield f"member {printable(member.name)!r} is of a listed row"
            elif member.data is None:
                if member.damaged or member.size:  # a link holds nothing
                    yield f"member {printable(member.name)!r} cannot be read ({member.problem}): it may be one of them"
            elif (uid := uid_of(member.data)) in self.uids:
                yield f"member {printable(member.name)!r} is the image {uid}"
            elif self._names_one(member):
                yield f"member {printable(member.name)!r} is of a listed image"

    def _names_one(self, member: Member) -> bool:
        """True if the JSON of a sample has a listed uid."""
        if not member.name.endswith(".json") or member.data is None or b'"uid"' not in member.data:
            return False
        try:
            meta = bounded_json.parse(member.data)
        except ValueError:
            return False
        return isinstance(meta, dict) and any(meta.get(name) in self.uids for name in _UIDS)

    def _of_bytes(self, head: bytes, stream: BinaryIO) -> Iterator[str]:
        digest = hashlib.sha256(head)
        while data := stream.read(_CHUNK):
            digest.update(data)
        if (uid := digest.hexdigest()[:DIGITS]) in self.uids:
            yield f"is the image {uid}"

    def _of_parquet(self, parquet: pq.ParquetFile) -> Iterator[str]:
        schema = parquet.schema_arrow
        rows = _IMAGES if _embedded(schema) else _ROWS
        yield from self._of_batches(schema, lambda: parquet.iter_batches(rows, use_threads=False))

    def _is_lance(self, stream: BinaryIO, head: bytes) -> bool:
        """True for a data file of Lance. The stream stays behind the head."""
        if self.name.endswith(_VERSION):
            return False
        stream.seek(-min(len(_LANCE), len(head)), os.SEEK_END)
        tail = stream.read()
        stream.seek(len(head))
        return tail == _LANCE

    def _of_lance(self, stream: BinaryIO) -> Iterator[str]:
        """Faults of a data file of a Lance table, which its library reads from a local disk."""
        try:
            from lance.file import LanceFileReader
        except ImportError:
            yield "a Lance file, which cannot be read without pylance; pip install 'capipe[lance]'"
            return
        with NamedTemporaryFile(suffix=".lance") as copy:
            if not self.folder.is_local:
                stream.seek(0)
                shutil.copyfileobj(stream, copy)
                copy.flush()
            path = str(self.folder.local(self.name).absolute()) if self.folder.is_local else copy.name
            reader = LanceFileReader(path)
            yield from self._of_batches(
                reader.metadata().schema, lambda: reader.read_all(batch_size=_IMAGES).to_batches()
            )

    def _of_batches(self, schema: pa.Schema, batches: Callable[[], Iterable[pa.RecordBatch]]) -> Iterator[str]:
        images, row = _embedded(schema), 0
        if "uid" not in schema.names and not images:
            return
        for batch in batches():
            if "uid" in schema.names:
                yield from self._of_rows(batch, row)
            for name, path in images:
                yield from self._of_images(batch.column(name), path, row)
            row += len(batch)

    def _of_rows(self, batch: pa.RecordBatch, start: int) -> Iterator[str]:
        for index in np.flatnonzero(self._listed(batch)).tolist():
            row = batch.slice(index, 1).to_pylist()[0]
            if is_tombstone(row):
                self.report.rows += 1
            else:
                yield f"row {start + index} is of the image {row['uid']}"

    def _of_images(self, values: Any, path: tuple[str, ...], start: int) -> Iterator[str]:
        for name in path:
            values = pc.struct_field(values, name)
        for index, value in enumerate(values):
            data = value.as_buffer() if value.is_valid else None
            if data is not None and hashlib.sha256(data).hexdigest()[:DIGITS] in self.uids:
                yield f"row {start + index} embeds the image {hashlib.sha256(data).hexdigest()[:DIGITS]}"

    def _of_array(self) -> Iterator[str]:
        """DataComp's list of kept uids: pairs of 64-bit numbers. Lists of withdrawn ones are of another type."""
        with self.folder.open(self.name) as stream:
            values = np.load(stream, allow_pickle=False)
        if values.dtype == np.dtype("u8,u8") and values.ndim == 1:
            packed = values.view("<u8").astype(">u8").reshape(-1, 2).view("S16").reshape(-1)
            for entry in np.flatnonzero(self.uids.holds(packed)).tolist():
                yield f"entry {entry} is a listed uid, as one that is kept"

    def _of_lines(self, keys: frozenset[str]) -> Iterator[str]:
        """JSON lines: a journal's rows (after a checksum), an export's entries."""
        with self.folder.open(self.name) as lines:
            for number, line in enumerate(lines, 1):
                body = line if line.startswith(b"{") else line.partition(b" ")[2]
                try:
                    entry = bounded_json.parse(body)
                except ValueError:
                    continue
                rows = [entry, entry.get("row")] if isinstance(entry, dict) else []
                if any(self._tells_of(row, keys) for row in rows if isinstance(row, dict)):
                    yield f"line {number} is of a listed image, or of its row"

    def _tells_of(self, row: Mapping[str, Any], keys: frozenset[str]) -> bool:
        listed = any(row.get(name) in self.uids for name in _UIDS)
        return _key(row) in keys or (listed and not is_tombstone(row))

    def _withdrawn_keys(self, shard: str) -> frozenset[str]:
        """Keys of listed uids by the Parquet of a shard of ours, whose keys are unique; none if there is no Parquet."""
        name = f"{shard}.parquet"
        if not shard or not self.folder.exists(name):
            return frozenset()
        with parquet_file(self.folder, name) as parquet:
            if not {*_KEYS} <= {*parquet.schema_arrow.names}:
                return frozenset()
            columns = [name for name in _UIDS if name in parquet.schema_arrow.names]
            table = parquet.read(columns=["key", *columns], use_threads=False)
        return frozenset(table.column("key").filter(pa.array(self._listed(table))).to_pylist())

    def _listed(self, rows: pa.Table | pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """Whether each row is of a listed image."""
        columns = [rows.column(name) for name in _UIDS if name in rows.schema.names]
        listed: npt.NDArray[np.bool_] = np.logical_or.reduce([self.uids.mask(column) for column in columns])
        return listed


def is_tombstone(row: Mapping[str, Any]) -> bool:
    """True if nothing is left of a row's image: it is withdrawn, and null but for its identity."""
    rest = (value for name, value in row.items() if name not in KEPT)
    return row.get("status") == Status.WITHDRAWN and all(value is None or value == [] for value in rest)


def _key(entry: Mapping[str, Any]) -> Any:
    """Key of an export's entry, by the names that its formats give it."""
    key = entry.get("id", entry.get("key"))
    return key if isinstance(key, str) else None


def _embedded(schema: pa.Schema) -> list[tuple[str, tuple[str, ...]]]:
    """Columns with binary fields, and the paths of these."""
    return [(column.name, path) for column in schema for path in _binaries(column)]


def _binaries(column: pa.Field) -> list[tuple[str, ...]]:
    """Paths of the binary fields in a column: of itself, or in a struct."""
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return [()]
    if pa.types.is_struct(column.type):
        return [(field.name, *path) for field in column.type for path in _binaries(field)]
    return []
