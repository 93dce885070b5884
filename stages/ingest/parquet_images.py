"""Parquet files with embedded images: Hugging Face's ``{bytes, path}``, plain bytes, or one-element lists of either.

Rows are listed without their images, which a worker reads from the file a few at a time. Bytes are not re-encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ...errors import BadInput
from ...manifests.files.outside import ANYWHERE, Reach
from ...manifests.files.storage import open_parquet
from ...manifests.files.tar import printable
from ...manifests.sidecars import jsonable
from ...manifests.status import Status
from ...models.images.formats import ImageProblem
from ..reading.columns import IMAGE_COLUMNS, PATH_COLUMNS, Columns, take_caption
from ..reading.files import read_file
from .source_refs import Handles, Item, ItemRef

_BATCH = 2_000  # rows per batch, without images


@dataclass(frozen=True, slots=True)
class ParquetImageRef:
    """Row ``row`` of a table, number ``place`` in row group ``group``, with its image in ``column``.

    ``size``: compressed bytes of the group's images, to detect a rewritten file. ``root``: root of image paths, for
    cells with a path instead of bytes; ``reach``: the permitted locations of those. ``meta``: other columns as JSON.
    """

    table: str
    column: str
    root: str
    row: int
    group: int
    place: int
    size: int
    text: str | None
    url: str | None
    meta: str
    reach: Reach = ANYWHERE

    @property
    def source(self) -> str:
        return printable(f"{self.table}[{self.row}]")

    def identity(self) -> str:
        return json.dumps(["parquet", self.row, self.size, self.text, self.url, self.meta])

    def load(self, handles: Handles) -> Item:
        item = Item(self.source, None, self.text, self.url, json.loads(self.meta))
        value = handles.cells(self.table, self.column).value(self.group, self.place)
        item.data, item.problem = image_bytes(value, self.column, self.root, self.reach)
        return item


def image_bytes(
    value: object, column: str, root: str = "", reach: Reach = ANYWHERE
) -> tuple[bytes | None, ImageProblem | None]:
    """The single image of a cell, or the problem. A path instead of bytes is relative to ``root``, and limited to
    ``reach``."""
    values = [element for element in value if element is not None] if isinstance(value, list) else [value]
    if len(values) > 1:
        reason = f"{len(values)} images in column {column!r}; a row is one image with its caption"
        return None, ImageProblem(Status.UNSUPPORTED, reason)
    cell = values[0] if values else None
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
    if isinstance(data, bytes):
        return data, None
    if isinstance(path, str) and path:
        return read_file(path, root, reach)
    return None, ImageProblem(Status.CORRUPT, f"no image in column {column!r}")


def image_column(table: str, wanted: str | None) -> str | None:
    """The column that holds images; None if there is none, or if ``wanted`` is not one. Raises OSError."""
    with open_parquet(table) as file:
        schema = file.schema_arrow
    images = [field.name for field in schema if _is_image(field)]
    if wanted is not None:
        return wanted if wanted in images else None
    named = [name for name in (*IMAGE_COLUMNS, *PATH_COLUMNS) if name in images]
    return next(iter([*named, *(name for name in images if not pa.types.is_binary(schema.field(name).type))]), None)


def _is_image(field: pa.Field) -> bool:
    kind = field.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and _is_bytes(kind.field(position).type)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def image_refs(table: str, column: str, columns: Columns, root: str, reach: Reach) -> Iterator[ItemRef]:
    """Rows of a table with images in ``column``. Raises BadInput at once for an unknown text column."""
    with open_parquet(table) as file:
        columns.check_text(table, file.schema_arrow.names)
    return (replace(ref, reach=reach) for ref in _refs(table, column, columns.text, root))


def _refs(table: str, column: str, text_column: str | None, root: str) -> Iterator[ParquetImageRef]:
    number = 0
    try:
        with open_parquet(table) as file:
            listed = [field.name for field in file.schema_arrow if not _is_image(field)]
            for group in range(file.num_row_groups):
                size = _compressed(file.metadata.row_group(group), column)
                for position, row in enumerate(_rows(file, group, listed)):
                    yield _ref(table, column, root, number, group, position, size, row, text_column)
                    number += 1
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{table}: damaged after row {number} ({error}); restore it") from None


def _rows(file: Any, group: int, listed: list[str]) -> Iterator[dict[str, Any]]:
    if not listed:
        yield from ({} for _ in range(file.metadata.row_group(group).num_rows))
        return
    for batch in file.iter_batches(_BATCH, row_groups=[group], columns=listed, use_threads=False):
        yield from batch.to_pylist()


def _compressed(group: Any, column: str) -> int:
    chunks = [group.column(number) for number in range(group.num_columns)]
    return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column)


def _ref(
    table: str,
    column: str,
    root: str,
    number: int,
    group: int,
    position: int,
    size: int,
    row: Mapping[str, Any],
    text_column: str | None,
) -> ParquetImageRef:
    text, whole = take_caption(row, text_column)
    url = row.get("url")
    meta = json.dumps(jsonable({name: value for name, value in row.items() if name != whole}), ensure_ascii=False)
    return ParquetImageRef(
        table, column, root, number, group, position, size, text, url if isinstance(url, str) else None, meta
    )
