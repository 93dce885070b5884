"""Parquet with embedded images, as read by `datasets` and the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...manifests.file_transaction import FileTransaction
from ...manifests.sidecars import decode_meta, encode_meta
from ..ingest.shard import clean
from .source import Pair
from .writer import ShardWriter

#: Row group limits for the Hub's viewer, which reads whole groups of at most a few hundred MB, and shows 100 rows.
GROUP_ROWS = 100
GROUP_BYTES = 32 << 20

_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
URL, JSON = "url", "json"  # columns of the image's metadata
LEFT_OUT = ("status", "error", "image", "caption")  # every row is ok; the last two are columns of the export itself


def training_file(shard: str) -> str:
    return f"data/{shard}.parquet"


def training_schema(rows: pa.Schema) -> pa.Schema:
    """Schema of image, caption, the listing's columns and the sample's JSON, with the metadata that makes `datasets`
    decode the image. Of the JSON, whose keys and types vary from row to row, only ``url`` is a separate column."""
    import datasets

    rest = [pa.field(field.name, field.type) for field in rows if field.name not in LEFT_OUT]
    known = {field.name for field in rest}
    extra = [pa.field(name, pa.string()) for name in (URL, JSON) if name not in known]
    plain = pa.schema([pa.field("image", _IMAGE), pa.field("caption", pa.string()), *rest, *extra])
    features = datasets.Features.from_arrow_schema(plain)
    features["image"] = datasets.Image()
    return plain.with_metadata(features.arrow_schema.metadata)


class TrainingParquet(ShardWriter):
    """The shard's ok rows with image and caption. A shard without any gets no file. ``rows``: the listing's schema."""

    extras = ("data",)
    data_files = "data/*.parquet"
    loading = """\
```python
import datasets

datasets.load_dataset("path/of/this/folder", split="train")  # or its name on the Hub
datasets.load_dataset("parquet", data_files="path/data/*.parquet", split="train")
```"""

    def __init__(self, out: FileTransaction, shard: str, rows: pa.Schema) -> None:
        super().__init__(out, shard)
        self._schema, self._listed = training_schema(rows), set(rows.names)
        self._names = [name for name in self._schema.names if name in self._listed]
        self._writer: pq.ParquetWriter | None = None
        self._group: list[dict[str, Any]] = []
        self._samples = self._size = 0

    @classmethod
    def for_shard(cls, out: FileTransaction, shard: str, rows: pa.Schema, extension: str | None) -> TrainingParquet:
        return cls(out, shard, rows)

    def add(self, pair: Pair) -> None:
        image = {"bytes": pair.image, "path": f"{pair.row['key']}.{pair.extension}"}
        row = {name: pair.row[name] for name in self._names if name != "caption"}
        self._group.append({**metadata_of(pair), **row, "image": image, "caption": pair.caption})
        self._samples, self._size = self._samples + 1, self._size + len(pair.image)
        if len(self._group) >= GROUP_ROWS or self._size >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            file = self.open.enter_context(self.out.writing(training_file(self.shard)))
            writer = pq.ParquetWriter(file, self._schema, compression="zstd", write_page_index=True)
            self._writer = self.open.enter_context(writer)
        self._writer.write_table(pa.Table.from_pylist(self._group, schema=self._schema))
        self._group, self._size = [], 0

    def finish(self) -> dict[str, Any]:
        if self._group:
            self._flush()
        self.open.close()
        return {"samples": self._samples}


def metadata_of(pair: Pair) -> dict[str, str | None]:
    """JSON of a sample as in the tar, and its ``url`` if that is a text."""
    member = pair.sample.members.get("json")
    meta = decode_meta(member.data if member else None, [])
    if meta is None:
        return {URL: None, JSON: None}
    url = meta.get(URL)
    return {URL: clean(url) if isinstance(url, str) else None, JSON: encode_meta(meta, {}).decode()}
