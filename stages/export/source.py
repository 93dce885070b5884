"""Export input: the listing of a finished shard and its samples, read row by row and verified.

The samples are in the shard's tar or, if it is of an index, in the original tars (:mod:`..filter.index`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import DamagedShard
from ...manifests.artifact import Artifact
from ...manifests.file_transaction import FileTransaction
from ...manifests.files.storage import expecting, parquet_file, parquet_of
from ...manifests.files.tar import scan
from ...manifests.joining.index_tars import is_index
from ...manifests.manifest import ShardRecord
from ...manifests.samples import Sample, read_samples
from ...manifests.status import Status
from ..annotate.captioner import chosen_caption
from ..filter.index import indexed_extensions, indexed_samples

PARTS = "_capipe/parts"  # per-shard parts of the files that span all shards


@dataclass(frozen=True)
class Pair:
    """One image with its caption. ``extension``: that of its tar member; ``row``: its Parquet row, number ``index`` of
    its shard."""

    index: int
    row: Mapping[str, Any]
    sample: Sample
    image: bytes
    extension: str
    caption: str


def listing(shard: str) -> str:
    """File name of the Parquet with one row per input row."""
    return f"{shard}.parquet"


def copy(source: Artifact, record: ShardRecord, name: str, out: FileTransaction) -> None:
    """Copy a file of the source's shard unchanged."""
    with source.folder.open(name) as file:
        out.copy(file, name, str(record.files[name]["sha256"]), f"{source.url}/{name}")


def committed_listing(source: Artifact, record: ShardRecord) -> pq.ParquetFile:
    """Open the listing of a source's shard. Raises ArtifactMismatch if it differs from the committed one."""
    name, digest = listing(record.shard), hashlib.sha256()
    if not source.folder.is_local:
        data = source.folder.read_bytes(name)
        check_digest(hashlib.sha256(data).hexdigest(), record, name, source)
        return expecting(parquet_of(data), record.count, f"{source.url}/{name}")
    with source.folder.open(name) as file:
        while data := file.read(1 << 20):
            digest.update(data)
    check_digest(digest.hexdigest(), record, name, source)
    return expecting(parquet_file(source.folder, name), record.count, f"{source.url}/{name}")


def column_of(source: Artifact, record: ShardRecord, name: str, *, pairs_only: bool = False) -> list[str]:
    """A column of a source's listing, for all rows or only those that are pairs."""
    with committed_listing(source, record) as listed:
        table = listed.read(columns=[*dict.fromkeys((name, "status"))], use_threads=False)
    rows = table.filter(pc.equal(table["status"], str(Status.OK))) if pairs_only else table
    values: list[str] = rows.column(name).to_pylist()
    return values


def check_digest(found: str, record: ShardRecord, name: str, source: Artifact) -> None:
    """Raise ArtifactMismatch if a file of the source's shard differs from the committed one."""
    if found != record.files[name]["sha256"]:
        text = f"{source.url}/{name}: its bytes are not those its manifest lists; `capipe verify` says what is wrong"
        raise DamagedShard(text)


def ok_rows(listed: pq.ParquetFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a listing that have a sample in the tar, in order, with their row numbers."""
    index = 0
    for batch in listed.iter_batches(1000, use_threads=False):
        for row in batch.to_pylist():
            if row["status"] == Status.OK:
                yield index, row
            index += 1


def caption_of(row: Mapping[str, Any]) -> str:
    """Caption in the tar's ``txt``: the selected one, else the first generated one that is ok, else the original."""
    if "caption" in row:
        return row["caption"] or ""
    if "captions" in row:
        return chosen_caption(row)
    return row.get("text") or ""


def pairs(source: Artifact, record: ShardRecord, listed: pq.ParquetFile, images: Sequence[str] = ()) -> Iterator[Pair]:
    """Pairs of one shard with this listing. Iterate to the end: only then are the tar's bytes verified.

    ``images``: folders and URLs below which an index's tars may be read.
    Raises ArtifactMismatch if tar and listing disagree, or the tar differs from the committed one.
    """
    if is_index(source):
        where = f"{source.url}/{listing(record.shard)}"
        for index, row, sample in indexed_samples(source, record, ok_rows(listed), images):
            yield _pair(index, row, sample, where)
        return
    name, digest = f"{record.shard}.tar", hashlib.sha256()
    where = f"{source.url}/{name}"
    with source.folder.open(name) as stream:
        samples = read_samples(stream, digest=digest)
        for index, row in ok_rows(listed):
            yield _pair(index, row, next(samples, None), where)
        if next(samples, None) is not None:
            raise DamagedShard(f"{where}: has samples that its Parquet does not list; restore both")
    check_digest(digest.hexdigest(), record, name, source)


def _pair(index: int, row: Mapping[str, Any], sample: Sample | None, where: str) -> Pair:
    image = sample.image() if sample is not None else None
    if sample is None or sample.key != row["key"] or image is None or image.data is None:
        actual = "nothing" if sample is None else f"{sample.key!r} ({sample.error or 'another sample'})"
        text = f"{where}: row {row['key']!r} expected, {actual} found; the tar does not fit its Parquet"
        raise DamagedShard(f"{text}, restore both (`capipe verify` lists what is damaged)")
    extension = next(ext for ext, member in sample.members.items() if member is image)
    txt = sample.members.get("txt")
    text = ((txt.data if txt else None) or b"").decode("utf-8", "replace")
    if text != caption_of(row):
        raise DamagedShard(f"{where}: the caption of {row['key']!r} is not the one its Parquet lists; restore both")
    return Pair(index, row, sample, image.data, extension, text)


def image_extensions(source: Artifact, record: ShardRecord, images: Sequence[str] = ()) -> set[str]:
    """Extensions of a shard's image members: from its listing if it has formats, else from the tar's headers."""
    if not record.rows.get(Status.OK):
        return set()
    with committed_listing(source, record) as listed:
        if is_index(source):
            return indexed_extensions(source, record, ok_rows(listed), images)
        names = listed.schema_arrow.names
    if "format" in names:
        return set(column_of(source, record, "format", pairs_only=True))
    with source.folder.open(f"{record.shard}.tar") as stream:
        extensions = {member.name.rpartition("/")[2].partition(".")[2].lower() for member in scan(stream)}
    return extensions - {"txt", "json"}
