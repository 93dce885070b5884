"""Parquet with the images inside, as `datasets` and the Hugging Face Hub read it."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..manifests.artifact import Artifact
from ..manifests.file_transaction import FileTransaction
from ..manifests.manifest import ShardRecord
from ..manifests.status import Status
from ..manifests.storage import open_parquet
from .export_source import listing, pairs

#: Row groups are what the Hub's viewer reads at once: it takes a few hundred MB at most, and shows a hundred rows.
GROUP_ROWS = 100
GROUP_BYTES = 32 << 20

_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
_LEFT_OUT = ("status", "error", "image", "caption")  # every row is ok; the last two are the product itself


def training_file(shard: str) -> str:
    return f"data/{shard}.parquet"


def training_schema(rows: pa.Schema) -> pa.Schema:
    """Image, caption and the listing's columns, with the metadata by which `datasets` knows the image for one."""
    import datasets

    rest = [pa.field(field.name, field.type) for field in rows if field.name not in _LEFT_OUT]
    plain = pa.schema([pa.field("image", _IMAGE), pa.field("caption", pa.string()), *rest])
    features = datasets.Features.from_arrow_schema(plain)
    features["image"] = datasets.Image()
    return plain.with_metadata(features.arrow_schema.metadata)


def write_training_parquet(source: Artifact, record: ShardRecord, out: FileTransaction) -> dict[str, Any]:
    """The shard's ok rows with image and caption; returns their number. A shard without one gets no file."""
    if not record.rows.get(Status.OK):
        return {"samples": 0}
    with open_parquet(str(out.path(listing(record.shard)))) as listed:
        schema = training_schema(listed.schema_arrow)
    names = [field.name for field in schema if field.name not in ("image", "caption")]
    group: list[dict[str, Any]] = []
    samples = size = 0
    with (
        out.writing(training_file(record.shard)) as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_index=True) as writer,
    ):
        for pair in pairs(source, record, out):
            image = {"bytes": pair.image, "path": f"{pair.row['key']}.{pair.extension}"}
            group.append({"image": image, "caption": pair.caption, **{name: pair.row[name] for name in names}})
            samples, size = samples + 1, size + len(pair.image)
            if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group, size = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    return {"samples": samples}
