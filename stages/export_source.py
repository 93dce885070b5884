"""What an export reads: the listing of a finished shard and the samples of its tar, side by side and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from ..errors import ArtifactMismatch
from ..manifests.artifact import Artifact
from ..manifests.file_transaction import FileTransaction
from ..manifests.manifest import ShardRecord
from ..manifests.samples import Sample, read_samples
from ..manifests.status import Status
from ..manifests.storage import open_parquet, parquet_file
from ..manifests.tar import scan
from .annotate import chosen_caption

PARTS = "_capipe/parts"  # what the files over all shards are put together from


@dataclass(frozen=True)
class Pair:
    """One image with its caption. ``extension``: what its tar member was called; ``row``: its Parquet row."""

    row: Mapping[str, Any]
    sample: Sample
    image: bytes
    extension: str
    caption: str


def listing(shard: str) -> str:
    """The Parquet with a row for every input row."""
    return f"{shard}.parquet"


def made_of(source: Artifact, record: ShardRecord) -> dict[str, Any]:
    """What the manifest says of an exported shard's input; a source that was done again has other digests."""
    tar = record.files[f"{record.shard}.tar"]
    rows = record.files[listing(record.shard)]["sha256"]
    return {"url": f"{source.url}/{record.shard}.tar", "digest": tar["sha256"], "bytes": tar["bytes"], "rows": rows}


def copy(source: Artifact, record: ShardRecord, name: str, out: FileTransaction) -> None:
    """A file of the source's shard as it is."""
    with source.folder.open(name) as file:
        out.copy(file, name, str(record.files[name]["sha256"]), f"{source.url}/{name}")


def ok_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a listing that have a sample in the tar, in order."""
    with open_parquet(str(path)) as file:
        for batch in file.iter_batches(1000, use_threads=False):
            yield from (row for row in batch.to_pylist() if row["status"] == Status.OK)


def caption_of(row: Mapping[str, Any]) -> str:
    """What the tar's ``txt`` holds: the selected caption, else the first healthy written one, else the original."""
    if "caption" in row:
        return row["caption"] or ""
    if "captions" in row:
        return chosen_caption(row)
    return row.get("text") or ""


def pairs(source: Artifact, record: ShardRecord, out: FileTransaction) -> Iterator[Pair]:
    """The pairs of one shard, its listing being copied already. Iterate to the end: only then are the bytes checked.

    Raises ArtifactMismatch where tar and listing do not tell the same, or the tar is not the committed one.
    """
    name, digest = f"{record.shard}.tar", hashlib.sha256()
    where = f"{source.url}/{name}"
    with source.folder.open(name) as stream:
        samples = read_samples(stream, digest=digest)
        for row in ok_rows(out.path(listing(record.shard))):
            yield _pair(row, next(samples, None), where)
        if next(samples, None) is not None:
            raise ArtifactMismatch(f"{where}: has samples that its Parquet does not list; restore both")
    if digest.hexdigest() != record.files[name]["sha256"]:
        text = f"{where}: its bytes are not those its manifest lists; `capipe verify` says what is wrong"
        raise ArtifactMismatch(text)


def _pair(row: Mapping[str, Any], sample: Sample | None, where: str) -> Pair:
    image = sample.image() if sample is not None else None
    if sample is None or sample.key != row["key"] or image is None or image.data is None:
        found = "nothing" if sample is None else f"{sample.key!r} ({sample.error or 'another sample'})"
        text = f"{where}: row {row['key']!r} expected, {found} found; the tar does not fit its Parquet"
        raise ArtifactMismatch(f"{text}, restore both (`capipe verify` lists what is damaged)")
    extension = next(ext for ext, member in sample.members.items() if member is image)
    txt = sample.members.get("txt")
    text = ((txt.data if txt else None) or b"").decode("utf-8", "replace")
    if text != caption_of(row):
        raise ArtifactMismatch(f"{where}: the caption of {row['key']!r} is not the one its Parquet lists; restore both")
    return Pair(row, sample, image.data, extension, text)


def image_extensions(source: Artifact, record: ShardRecord) -> set[str]:
    """How the image members of one shard are called: from its listing where that says, else from the tar's headers."""
    if not record.rows.get(Status.OK):
        return set()
    parquet = parquet_file(source.folder, listing(record.shard))
    if "format" in parquet.schema_arrow.names:
        table = parquet.read(columns=["status", "format"], use_threads=False)
        return set(table.filter(pc.equal(table["status"], "ok")).column("format").unique().to_pylist())
    with source.folder.open(f"{record.shard}.tar") as stream:
        names = {member.name.rpartition("/")[2].partition(".")[2].lower() for member in scan(stream)}
    return names - {"txt", "json"}
