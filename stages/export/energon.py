"""Megatron-Energon index of tars: the output of its ``energon prepare``, written while the tars are copied.

``X.tar.idx`` next to each tar has native 64-bit offsets: of the header of each sample's first member, and of the end of
the last sample. ``.nv-meta/`` has the shards with their counts, the split, and the field map of samples; its SQLite
file indexes samples and members by key. The formats are those of megatron-energon 7.4.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import yaml

from ...errors import DamagedShard
from ...manifests.files.tar import BLOCK, scan
from ...manifests.samples import split_name

META = ".nv-meta"

#: One row per member of a tar, in order: the input of the SQLite file, written once all tars exist.
PARTS = pa.schema(
    [
        pa.field("sample", pa.int32(), nullable=False),  # index of its sample in the tar
        pa.field("part", pa.string(), nullable=False),  # extension
        pa.field("offset", pa.int64(), nullable=False),  # of its bytes, in bytes
        pa.field("size", pa.int64(), nullable=False),
    ]
)

_TABLES = """
create table samples (
    tar_file_id integer not null, sample_key text not null unique, sample_index integer not null,
    byte_offset integer, byte_size integer
);
create table sample_parts (
    tar_file_id integer, sample_index integer, part_name text, content_byte_offset integer, content_byte_size integer
);
"""
_INDEXES = """
create index idx_samples_by_tar_and_idx on samples (tar_file_id, sample_index);
create index idx_sample_parts_seq on sample_parts (tar_file_id, sample_index, content_byte_offset);
create index idx_sample_parts_full on sample_parts
    (tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


@dataclass
class TarIndex:
    """Offsets in one tar. ``starts`` has one entry more than ``keys``: the end of the last sample."""

    keys: list[str] = field(default_factory=list)
    starts: array[int] = field(default_factory=lambda: array("Q"))
    parts: list[tuple[int, str, int, int]] = field(default_factory=list)  # rows of PARTS

    def offsets(self) -> bytes:
        """Contents of the ``.tar.idx``."""
        return self.starts.tobytes()

    def table(self) -> pa.Table:
        rows = [dict(zip(PARTS.names, part, strict=True)) for part in self.parts]
        return pa.Table.from_pylist(rows, schema=PARTS)


def index_tar(stream: BinaryIO, where: str) -> TarIndex:
    """Index a tar written by capipe: members are contiguous, so each header begins at the end of the previous member.

    Reads headers only. Raises ArtifactMismatch, with ``where``, for a damaged tar.
    """
    index, end = TarIndex(), 0
    for member in scan(stream):
        if member.problem is not None:
            raise DamagedShard(f"{where}: {member.problem}; `capipe verify` says what else is wrong")
        key, part = split_name(member.name)
        if not index.keys or index.keys[-1] != key:
            index.keys.append(key)
            index.starts.append(end)
        index.parts.append((len(index.keys) - 1, part, member.offset, member.size))
        end = member.offset + -(-member.size // BLOCK) * BLOCK
    index.starts.append(end)
    return index


@dataclass(frozen=True)
class IndexedTar:
    """An exported tar for the meta folder. ``parts``: a table of :data:`PARTS`."""

    name: str
    sha256: str
    keys: Sequence[str]
    starts: Sequence[int]
    parts: pa.Table


def write_database(path: Path, tars: Iterable[IndexedTar]) -> None:
    """Write ``index.sqlite``. Raises sqlite3.IntegrityError for duplicate keys."""
    path.unlink(missing_ok=True)
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.executescript("pragma journal_mode=off; pragma synchronous=off;" + _TABLES)
        database.execute("begin")
        for number, tar in enumerate(tars):
            database.executemany("insert into samples values (?, ?, ?, ?, ?)", _sample_rows(number, tar))
            database.executemany("insert into sample_parts values (?, ?, ?, ?, ?)", _part_rows(number, tar))
        database.execute("commit")
        database.executescript(_INDEXES)
    finally:
        database.close()


def _sample_rows(number: int, tar: IndexedTar) -> Iterator[tuple[int, str, int, int, int]]:
    for index, key in enumerate(tar.keys):
        start = tar.starts[index]
        yield number, key, index, start, tar.starts[index + 1] - start


def _part_rows(number: int, tar: IndexedTar) -> Iterator[tuple[int, int, str, int, int]]:
    for batch in tar.parts.to_batches(10_000):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield number, *row


def dataset_yaml(extensions: Sequence[str]) -> bytes:
    """Energon's field map to image and caption; ``extensions``: those of the images."""
    loader = {
        "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"},
        "field_map": {"image": ",".join(extensions), "caption": "txt"},
    }
    return yaml.safe_dump(loader, sort_keys=False).encode()


def split_yaml(tars: Iterable[str]) -> bytes:
    """Split with all shards for training; users may add ``00000.tar`` or ``00000.tar/key`` to ``exclude``."""
    split = {"split_parts": {"train": list(tars), "val": [], "test": []}, "exclude": []}
    return yaml.safe_dump(split, sort_keys=False).encode()


def info_json(counts: Mapping[str, int]) -> bytes:
    """Samples per tar, in the database's order."""
    return json.dumps({"shard_counts": dict(counts)}, indent=2).encode()


def index_uuid(digests: Iterable[str]) -> bytes:
    """UUID of the index for Energon's caches: random in its own tool, here from the tars' sha256, so reproducible."""
    digest = hashlib.sha256("\n".join(digests).encode()).digest()
    return str(uuid.UUID(bytes=digest[:16], version=4)).encode()
