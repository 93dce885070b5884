"""The Lance table of an export: where it is, its columns, and what it needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import pyarrow as pa

from ....errors import BadInput
from ....manifests.fingerprint import canonical
from ..parquet import JSON, LEFT_OUT, URL
from ..source import PARTS

FORMAT = "lance"
TABLE = "train.lance"  # the table's folder in the export: `datasets` takes the name for the split
DATA = f"{TABLE}/data"
STORAGE = "2.1"  # version of Lance's file format
METADATA = b"capipe"  # key of the schema's metadata: license and provenance, as JSON

#: First columns of every table: images as they were collected, and what their headers say.
FIRST = [
    pa.field("key", pa.string()),
    pa.field("uid", pa.string()),
    pa.field("image", pa.large_binary()),
    pa.field("width", pa.int32()),  # upright, after EXIF rotation
    pa.field("height", pa.int32()),
    pa.field("format", pa.string()),
    pa.field("caption", pa.string()),
]


def check_installed() -> None:
    """Raises BadInput unless pylance is there."""
    if find_spec("lance") is None:
        raise BadInput("--format lance: the package pylance is not installed; pip install 'capipe[lance]'")


def table_schema(rows: pa.Schema) -> pa.Schema:
    """Columns of a table. ``rows``: schema of the listing, whose columns follow the first ones."""
    known = {field.name for field in FIRST}
    rest = [pa.field(field.name, field.type) for field in rows if field.name not in known | {*LEFT_OUT}]
    known |= {field.name for field in rest}
    extra = [pa.field(name, pa.string()) for name in (URL, JSON) if name not in known]
    return pa.schema([*FIRST, *rest, *extra])


def with_captions(schema: pa.Schema, columns: Iterable[str]) -> pa.Schema:
    """A table's schema with appended columns of captions."""
    return pa.schema([*schema, *caption_schema(columns)])


def caption_schema(columns: Iterable[str]) -> pa.Schema:
    return pa.schema([pa.field(name, pa.string()) for name in columns])


def columns_digest(schema: pa.Schema) -> str:
    """Identity of a schema's columns: fragments of one table have the same."""
    fields = [[field.name, str(field.type)] for field in schema]
    return hashlib.sha256(canonical(fields).encode()).hexdigest()[:16]


def data_file(shard: str, columns: str, sha256: str) -> str:
    """File of a shard's columns. Its name follows from its bytes: Lance's readers take data files for immutable."""
    return f"{DATA}/{shard}{columns and '-'}{columns}-{sha256[:16]}.lance"


def fragment_file(shard: str) -> str:
    """What Lance is to be told of a shard's data files."""
    return f"{PARTS}/{shard}.json"


def features(schema: pa.Schema) -> list[Any]:
    """The columns as a card lists them for `datasets`, which would else take the images for videos if the first is a
    WebP."""
    import datasets

    found = datasets.Features.from_arrow_schema(schema)
    found["image"] = datasets.Image()
    listed: list[Any] = found._to_yaml_list()
    return listed


def described(schema: pa.Schema, facts: dict[str, Any], appended: Sequence[dict[str, Any]]) -> pa.Schema:
    """The schema with metadata: ``facts`` on the whole table, and which captions were ``appended``."""
    text = json.dumps({**facts, "appended": list(appended)}, ensure_ascii=False, sort_keys=True)
    return schema.with_metadata({METADATA: text.encode()})
