"""Tars for webdataset, OpenCLIP, Hugging Face and Energon: copies of the source's tars, with Energon's index."""

from __future__ import annotations

from collections import Counter
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import DamagedShard
from ...manifests.artifact import Artifact
from ...manifests.file_transaction import FileTransaction
from ...manifests.files.storage import open_parquet
from ...manifests.files.tar import TarWriter
from ...manifests.manifest import ShardRecord
from ...manifests.status import Status
from .energon import META, TarIndex, index_tar
from .source import PARTS, Pair, copy, listing, ok_rows
from .writer import ShardWriter

SIZES = "sizes.json"


class RewrittenTar(ShardWriter):
    """Tar with every image named ``<key>.<extension>``, or names unchanged if that is None. Readers decode by content:
    PNG bytes stay PNG. A shard without samples gets no tar, as in :func:`copy_tar`."""

    extras = (SIZES, META)
    data_files = "*.tar"
    loading = """\
```python
import glob, datasets, webdataset

datasets.load_dataset("path/of/this/folder", split="train")  # or its name on the Hub; streaming=True for large ones
tars = sorted(glob.glob("path/*.tar"))
webdataset.WebDataset(tars, shardshuffle=len(tars)).decode("pil").to_tuple("{images}", "txt")
```

OpenCLIP finds the number of samples in `sizes.json`; Megatron-Energon reads the folder as it is (`.nv-meta/`)."""

    def __init__(self, out: FileTransaction, shard: str, extension: str | None) -> None:
        super().__init__(out, shard)
        self._extension = extension
        self._tar: TarWriter | None = None

    @classmethod
    def for_shard(cls, out: FileTransaction, shard: str, rows: pa.Schema, extension: str | None) -> RewrittenTar:
        return cls(out, shard, extension)

    def add(self, pair: Pair) -> None:
        if self._tar is None:
            self._tar = TarWriter(cast(BinaryIO, self.open.enter_context(self.out.writing(f"{self.shard}.tar"))))
        for name, member in pair.sample.members.items():
            called = name if name != pair.extension or self._extension is None else self._extension
            self._tar.add(f"{pair.sample.key}.{called}", member.data or b"")

    def finish(self) -> dict[str, Any]:
        if self._tar is None:
            return _EMPTY
        self._tar.finish()
        self.open.close()
        return _indexed(self.out, self.shard, f"{self.shard}.tar")


def copy_tar(source: Artifact, record: ShardRecord, out: FileTransaction, *, link: bool) -> dict[str, Any]:
    """Copy or link the shard's tar, and write its index; returns its sample count and images by extension.

    A shard without samples gets no tar: `datasets` and Energon fail on an empty one.
    """
    if not record.rows.get(Status.OK):
        return _EMPTY
    name = f"{record.shard}.tar"
    if link:
        out.link(source.folder.local(name), name, str(record.files[name]["sha256"]))
    else:
        copy(source, record, name, out)
    return _indexed(out, record.shard, f"{source.url}/{name}")


_EMPTY: dict[str, Any] = {"samples": 0, "images": {}}


def _indexed(out: FileTransaction, shard: str, where: str) -> dict[str, Any]:
    """Write the index of the shard's tar; tar and listing must exist."""
    with out.path(f"{shard}.tar").open("rb") as stream:
        index = index_tar(stream, where)
    with open_parquet(str(out.path(listing(shard)))) as listed:
        keys = [row["key"] for _, row in ok_rows(listed)]
    if index.keys != keys:
        text = f"{where}: its samples are not the ok rows of its Parquet"
        raise DamagedShard(f"{text}; `capipe verify` says what is wrong")
    _write_index(shard, index, out)
    images = Counter(part for _, part, _, _ in index.parts if part not in ("txt", "json"))
    return {"samples": len(index.keys), "images": dict(sorted(images.items()))}


def _write_index(shard: str, index: TarIndex, out: FileTransaction) -> None:
    with out.writing(f"{shard}.tar.idx") as file:
        file.write(index.offsets())
    with out.writing(f"{PARTS}/{shard}.parquet") as file:
        pq.write_table(index.table(), file, compression="zstd")
