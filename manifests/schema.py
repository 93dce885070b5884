"""The columns of every artifact, written once. Readers check what they are given against these."""

from __future__ import annotations

import pyarrow as pa

from ..errors import ArtifactMismatch

SCHEMA_VERSION = 1

#: What every row of every artifact has. ``uid``: first 32 hex of the image bytes' sha256, null if there are no bytes.
BASE = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("uid", pa.string()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
]

INGEST = pa.schema(
    [
        *BASE,
        pa.field("sha256", pa.string()),
        pa.field("phash", pa.string()),  # 64-bit perceptual hash, 16 hex
        pa.field("width", pa.int32()),  # upright, after EXIF rotation
        pa.field("height", pa.int32()),
        pa.field("format", pa.string()),  # jpg, png or webp, by content
        pa.field("text", pa.string()),  # the original caption
        pa.field("url", pa.string()),
        pa.field("source", pa.string()),  # file, tar member or table row it came from
    ]
)

CAPTION = pa.struct(
    [
        pa.field("name", pa.string()),  # the prompt's name, with `#k` for the k-th of several samples
        pa.field("text", pa.string()),
        pa.field("model", pa.string()),
        pa.field("prompt_id", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("n_tokens", pa.int32()),
        pa.field("attempts", pa.int32()),
        pa.field("status", pa.string()),  # of this caption: a row is ok only when all of its captions are
    ]
)

ANNOTATE = pa.schema([*BASE, pa.field("text", pa.string()), pa.field("captions", pa.list_(CAPTION))])


def check(actual: pa.Schema, expected: pa.Schema, where: str) -> None:
    """Raise :class:`ArtifactMismatch` unless ``actual`` has every expected column with the expected type."""
    for field in expected:
        position = actual.get_field_index(field.name)
        if position < 0:
            raise ArtifactMismatch(f"{where}: column {field.name!r} is missing; it was not written by this stage")
        if actual.field(position).type != field.type:
            found = actual.field(position).type
            raise ArtifactMismatch(f"{where}: column {field.name!r} is {found}, expected {field.type}")
