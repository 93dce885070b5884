"""Tars for webdataset, OpenCLIP, Hugging Face and Energon: copies of ours with the index of where samples lie."""

from __future__ import annotations

from collections import Counter
from typing import Any, BinaryIO, cast

import pyarrow.parquet as pq

from ..errors import ArtifactMismatch
from ..manifests.artifact import Artifact
from ..manifests.file_transaction import FileTransaction
from ..manifests.manifest import ShardRecord
from ..manifests.status import Status
from ..manifests.tar import TarWriter
from .energon import TarIndex, index_tar
from .export_source import PARTS, copy, listing, ok_rows, pairs


def write_tar(
    source: Artifact, record: ShardRecord, out: FileTransaction, image_extension: str | None, *, link: bool
) -> dict[str, Any]:
    """The shard's tar and its index; returns its sample count and images by extension.

    A shard without a sample gets no tar: an empty one stops `datasets` and Energon, and tells readers nothing.
    """
    if not record.rows.get(Status.OK):
        return {"samples": 0, "images": {}}
    name = f"{record.shard}.tar"
    if image_extension is not None:
        _renamed(source, record, out, image_extension)
    elif link:
        out.link(source.folder.local(name), name, str(record.files[name]["sha256"]))
    else:
        copy(source, record, name, out)
    with out.path(name).open("rb") as stream:
        index = index_tar(stream, f"{source.url}/{name}")
    if index.keys != [row["key"] for row in ok_rows(out.path(listing(record.shard)))]:
        text = f"{source.url}/{name}: its samples are not the ok rows of its Parquet"
        raise ArtifactMismatch(f"{text}; `capipe verify` says what is wrong")
    _write_index(record.shard, index, out)
    images = Counter(part for _, part, _, _ in index.parts if part not in ("txt", "json"))
    return {"samples": len(index.keys), "images": dict(sorted(images.items()))}


def _renamed(source: Artifact, record: ShardRecord, out: FileTransaction, extension: str) -> None:
    """The same samples with every image called ``<key>.<extension>``. Readers decode by content: PNG bytes stay PNG."""
    with out.writing(f"{record.shard}.tar") as file:
        tar = TarWriter(cast(BinaryIO, file))
        for pair in pairs(source, record, out):
            for name, member in pair.sample.members.items():
                tar.add(f"{pair.sample.key}.{extension if name == pair.extension else name}", member.data or b"")
        tar.finish()


def _write_index(shard: str, index: TarIndex, out: FileTransaction) -> None:
    with out.writing(f"{shard}.tar.idx") as file:
        file.write(index.offsets())
    with out.writing(f"{PARTS}/{shard}.parquet") as file:
        pq.write_table(index.table(), file, compression="zstd")
