"""Tables of image paths as a source: Parquet, CSV, TSV and JSON lines, read as a stream."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..errors import BadInput
from ..manifests.sidecars import jsonable, mended, text_stream
from ..manifests.status import Status
from ..manifests.storage import open_parquet
from .items import TEXT_COLUMNS, ItemRef, ProblemRef, TableRef, open_binary

EXTENSIONS = ("parquet", "csv", "tsv", "jsonl", "ndjson")
PATH_COLUMNS = ("path", "image_path", "image", "file", "file_name", "filename")
_BATCH = 2000

Rows = Iterator[Mapping[str, Any] | str]  # a row, or what is wrong with it


def refs(table: str, path_column: str | None) -> Iterator[ItemRef]:
    """Every row of a table. Raises BadInput at once where it cannot be opened or has no column of paths."""
    extension = table.rpartition(".")[2].lower()
    try:
        columns, rows = {"parquet": _parquet, "jsonl": _jsonl, "ndjson": _jsonl}.get(extension, csv_rows)(table)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise BadInput(f"{table}: cannot be read as {extension} ({error})") from None
    column = _path_column(table, columns, path_column)
    root = table.rpartition("/")[0]
    return _refs(table, rows, column, root)


def _refs(table: str, rows: Rows, column: str, root: str) -> Iterator[ItemRef]:
    number = 0
    try:
        for number, row in enumerate(rows):
            yield _ref(table, number, row, column, root)
    except (OSError, pa.ArrowException, csv.Error) as error:
        raise BadInput(f"{table}: damaged after row {number} ({error}); restore it") from None


def _path_column(table: str, columns: Sequence[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise BadInput(f"{table}: no column {wanted!r}; its columns are {', '.join(columns)}")
        return wanted
    for name in PATH_COLUMNS:
        if name in columns:
            return name
    hint = "; URLs are img2dataset's job, its output folder is an input" if "url" in columns else ""
    text = f"{table}: no column of paths (looked for {', '.join(PATH_COLUMNS)}); name it with --path-column"
    raise BadInput(f"{text}. Its columns are {', '.join(columns)}{hint}")


def _ref(table: str, number: int, row: Mapping[str, Any] | str, column: str, root: str) -> ItemRef:
    if isinstance(row, str):
        return ProblemRef(f"{table}[{number}]", Status.CORRUPT, row)
    path = row.get(column)  # a name may be of any bytes
    if not isinstance(path, str) or not path:
        return ProblemRef(f"{table}[{number}]", Status.CORRUPT, f"no path in column {column!r}")
    text = next((name for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
    url = row.get("url")
    meta = {name: value for name, value in row.items() if name not in (column, text)}
    notes: list[str] = []
    encoded = mended(json.dumps(jsonable(meta), ensure_ascii=False), notes)
    caption, url = mended(row[text], notes) if text else None, mended(url, notes) if isinstance(url, str) else None
    return TableRef(table, number, root, path, caption, url, encoded, tuple(notes))


def _parquet(table: str) -> tuple[list[str], Rows]:
    file = open_parquet(table)
    schema = file.schema_arrow
    for name in PATH_COLUMNS:
        position = schema.get_field_index(name)
        if position >= 0 and (pa.types.is_struct(schema.types[position]) or pa.types.is_binary(schema.types[position])):
            folder = table.rpartition("/")[0] or "."
            text = f"{table}: column {name!r} holds images, not paths; load the folder as a dataset: hf://{folder}"
            raise BadInput(text)
    return list(schema.names), (
        row for batch in file.iter_batches(_BATCH, use_threads=False) for row in batch.to_pylist()
    )


def csv_rows(table: str) -> tuple[list[str], Rows]:
    """The columns of a CSV (or, by its extension, TSV) file, and its rows, faulty ones as their reasons."""
    stream = text_stream(open_binary(table))
    reader = csv.reader(stream, delimiter="\t" if table.endswith("tsv") else ",")
    columns = [mended(name, []) for name in next(reader, [])]

    def rows() -> Rows:
        with stream:
            for values in reader:
                if not values:  # a blank line, as editors leave at the end
                    continue
                if len(values) == len(columns):
                    yield dict(zip(columns, values, strict=True))
                else:
                    yield f"row has {len(values)} fields, the heading has {len(columns)}"

    return columns, rows()


def _jsonl(table: str) -> tuple[list[str], Rows]:
    """Columns are those of the first sound line; rows may have others."""

    def rows() -> Rows:
        with text_stream(open_binary(table)) as file:
            for line in file:
                if line.strip():
                    yield json_row(line)

    first = next((row for row in rows() if not isinstance(row, str)), {})
    return list(first), rows()


def json_row(line: bytes | str) -> Mapping[str, Any] | str:
    """A line of JSONL as a row, or what is wrong with it."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"line is not JSON: {error}"
    return value if isinstance(value, dict) else f"line is a JSON {type(value).__name__}, not an object"
