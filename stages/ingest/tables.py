"""Tables of images as a source: Parquet, CSV, TSV, JSON lines and JSON files, streamed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa

from ...errors import BadInput
from ...manifests.files.outside import ANYWHERE, Reach
from ...manifests.files.storage import open_parquet
from ...manifests.sidecars import jsonable, repaired, text_stream
from ...manifests.status import Status
from ..reading import coco
from ..reading.bounded_rows import MAX_HEADING, TOO_DEEP, Beyond, bounded_lines, csv_records, json_row
from ..reading.columns import PATH_COLUMNS, Columns, take_caption
from ..reading.conversations import CONVERSATION_COLUMNS, images_in
from ..reading.files import open_binary
from ..reading.json_files import begins_list, list_items, whole_object
from .parquet_images import image_column, image_refs
from .source_refs import ItemRef, ProblemRef, TableRef

EXTENSIONS = ("parquet", "csv", "tsv", "jsonl", "ndjson", "json")
_BATCH = 2000
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_LOOKED_AT = 100  # JSON rows from which a table's columns are inferred

DAMAGE = (OSError, pa.ArrowException, csv.Error, ValueError, RecursionError)  # errors that reading a table may raise
Rows = Iterator[Mapping[str, Any] | str]  # a row, or its error


def refs(table: str, columns: Columns, reach: Reach = ANYWHERE) -> Iterator[ItemRef]:
    """All rows of a table. ``reach``: the permitted locations of the paths in it.

    Raises BadInput at once if it cannot be opened or has no image column.
    """
    root = columns.folder if columns.folder is not None else table.rpartition("/")[0]
    if _extension(table) == "parquet":
        with _readable(table):
            held = image_column(table, columns.path)
        if held is not None:
            return image_refs(table, held, columns, root, reach)
    names, rows = rows_of(table)
    column = _path_column(table, names, columns.path)
    columns.check_text(table, names)
    return _refs(table, rows, column, columns.text, root, reach)


def rows_of(table: str) -> tuple[list[str], Rows]:
    """Columns of a table and its rows, which may raise DAMAGE. Raises BadInput if it cannot be opened."""
    readers = {"parquet": _parquet, "jsonl": _jsonl, "ndjson": _jsonl, "json": _json}
    with _readable(table):
        return readers.get(_extension(table), csv_rows)(table)


@contextmanager
def _readable(table: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise BadInput(f"{table}: cannot be read as {_extension(table)} ({error})") from None


def _extension(table: str) -> str:
    return table.rpartition(".")[2].lower()


def _refs(table: str, rows: Rows, column: str, text_column: str | None, root: str, reach: Reach) -> Iterator[ItemRef]:
    number = 0
    try:
        for number, row in enumerate(rows):
            yield _ref(table, number, row, column, text_column, root, reach)
    except DAMAGE as error:
        raise BadInput(f"{table}: damaged after row {number} ({error}); restore it") from None


def _path_column(table: str, names: Sequence[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in names:
            raise BadInput(f"{table}: no column {wanted!r}; its columns are {', '.join(names)}")
        return wanted
    for name in (*PATH_COLUMNS, *CONVERSATION_COLUMNS):  # a conversation may hold its image
        if name in names:
            return name
    hint = "; URLs are img2dataset's job, its output folder is an input" if "url" in names else ""
    text = f"{table}: no column of paths (looked for {', '.join(PATH_COLUMNS)}); name it with --path-column"
    raise BadInput(f"{text}. Its columns are {', '.join(names)}{hint}")


def _ref(
    table: str, number: int, row: Mapping[str, Any] | str, column: str, text_column: str | None, root: str, reach: Reach
) -> ItemRef:
    if isinstance(row, str):
        return ProblemRef(f"{table}[{number}]", status_of(row), row)
    paths = _paths(row, column)
    if len(paths) > 1:
        reason = f"{len(paths)} images in column {column!r}; a row is one image with its caption"
        return ProblemRef(f"{table}[{number}]", Status.UNSUPPORTED, reason)
    if not paths:
        return ProblemRef(f"{table}[{number}]", Status.CORRUPT, f"no path in column {column!r}")
    text, whole = take_caption(row, text_column)
    url = row.get("url")
    dropped = (whole, column if isinstance(row[column], str) else None)
    notes: list[str] = []
    try:
        meta = jsonable({name: value for name, value in row.items() if name not in dropped})
        encoded = repaired(json.dumps(meta, ensure_ascii=False), notes)
    except RecursionError:
        return ProblemRef(f"{table}[{number}]", Status.UNSUPPORTED, TOO_DEEP)
    caption, url = (repaired(value, notes) if isinstance(value, str) else None for value in (text, url))
    return TableRef(table, number, root, paths[0], caption, url, encoded, tuple(notes), reach)


def status_of(row: str) -> Status:
    """Status of a row that is an error."""
    return Status.UNSUPPORTED if isinstance(row, Beyond) else Status.CORRUPT


def _paths(row: Mapping[str, Any], column: str) -> list[str]:
    """Paths in a column: a string, a list, the images of a conversation, or objects such as {"path": ...}."""
    value = row.get(column)  # a name may have any bytes
    if column in CONVERSATION_COLUMNS:
        return images_in(value)
    values = value if isinstance(value, list) else [value]
    paths = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in values]
    return [path for path in paths if isinstance(path, str) and path]


def _parquet(table: str) -> tuple[list[str], Rows]:
    file = open_parquet(table)
    return list(file.schema_arrow.names), (
        row for batch in file.iter_batches(_BATCH, use_threads=False) for row in batch.to_pylist()
    )


def csv_rows(table: str) -> tuple[list[str], Rows]:
    """Columns and rows of a CSV or TSV file, with errors in place of faulty rows."""
    stream = text_stream(open_binary(table))
    heading = stream.readline(MAX_HEADING + 1)
    if len(heading) > MAX_HEADING:
        raise ValueError(f"its first line, the heading, has over {MAX_HEADING} characters")
    records = csv_records(stream, heading, "\t" if _extension(table) == "tsv" else delimiter(heading))
    first = next(records, [])
    if isinstance(first, str):
        raise ValueError(f"its heading: {first}")
    columns = [repaired(name, []) for name in first]

    def rows() -> Rows:
        with stream:
            for values in records:
                if not values:  # a blank line, as editors leave at the end
                    continue
                if isinstance(values, str):
                    yield values
                elif len(values) == len(columns):
                    yield dict(zip(columns, values, strict=True))
                else:
                    yield f"row has {len(values)} fields, the heading has {len(columns)}"

    return columns, rows()


def delimiter(heading: str) -> str:
    """The delimiter of a CSV: comma, tab or semicolon, whichever is most frequent in the header outside quotes.

    In that order for ties. From the header alone, as captions contain commas and tabs.
    """
    bare = _QUOTED.sub("", heading)
    return max(",\t;", key=bare.count)


def _jsonl(table: str) -> tuple[list[str], Rows]:
    def rows() -> Rows:
        with text_stream(open_binary(table)) as file:
            for line in bounded_lines(file):
                if line.strip():
                    yield json_row(line)

    return _names(rows()), rows()


def _names(rows: Rows) -> list[str]:
    """Columns of the first valid rows; later rows may have others."""
    sound = (row for row in rows if not isinstance(row, str))
    return list(dict.fromkeys(name for row in islice(sound, _LOOKED_AT) for name in row))


def _json(table: str) -> tuple[list[str], Rows]:
    """A list of objects, COCO captions, a single object, or JSON lines in a .json. Raises BadInput for other JSON."""
    if begins_list(table):
        names = _names(json_list_rows(table))
        if not names:
            raise _no_source(table, "a list without objects")
        return names, json_list_rows(table)
    whole = whole_object(table)
    if whole is None:
        names, rows = _jsonl(table)
        if not names:
            raise _no_source(table, "no JSON that can be read")
        return names, rows
    if coco.is_captions(whole):
        return coco.COLUMNS, coco.caption_rows(whole)
    if not any(isinstance(whole.get(name), str) for name in PATH_COLUMNS):
        raise _no_source(table, f"an object with {', '.join(map(repr, islice(whole, 8))) or 'nothing'} in it")
    return list(whole), iter([whole])


def json_list_rows(table: str) -> Rows:
    """Rows of a JSON list. Raises ValueError or RecursionError if it is invalid."""
    with open_binary(table) as file:
        for value in list_items(file):
            yield value if isinstance(value, dict | Beyond) else f"a JSON {type(value).__name__}, not an object"


def _no_source(table: str, what: str) -> BadInput:
    taken = "a list of objects with the path of an image in each (LLaVA, ShareGPT), and COCO's captions"
    return BadInput(f"{table}: no source capipe takes: {what}. Taken of JSON are {taken}")
