"""Question sets made elsewhere, read as a stream: CapRL's layouts, and one question a row as JSON, Parquet or CSV.

Nothing wrong with a record is fatal: it becomes a question that :func:`checked` refuses with its reason.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
from fsspec.core import url_to_fs

from ..errors import BadInput
from ..manifests.shards import uid_of
from ..manifests.sidecars import jsonable, mended
from ..manifests.status import QuestionStatus
from ..manifests.storage import open_parquet
from .items import open_binary
from .question_checks import RawQuestion
from .tables import Rows, csv_rows, json_row

EXTENSIONS = ("json", "jsonl", "ndjson", "parquet", "csv", "tsv")
IMAGE_FIELDS = ("uid", "key", "image_path", "image", "images", "path", "file", "file_name", "filename")
LIST_FIELDS = ("qa_list", "questions", "qa", "message", "reward_model", "ground_truth")
OPTION_FIELDS = ("options", "choices")
_BATCH = 100  # rows of a Parquet file at a time: images may lie in them
_MAX_NAME = 4_096  # characters; a longer "image" is no path but the image itself, as base64
_OPTION_LINE = re.compile(r"\s*(?:[-*•]\s*)?\(?(?P<label>[A-K])[.)]\s*\S.*")


@dataclass(frozen=True, slots=True)
class QuestionRecord:
    """What one record of a set asks about one image.

    ``images``: all that it says of which image that is, the surest first: uid, key, file name or path. Empty where it
    says nothing. ``raw``: the record as JSON without the image's bytes. ``where``: "file:line" or "file[row]".
    """

    images: tuple[str, ...]
    questions: tuple[RawQuestion, ...]
    raw: str
    where: str


Located = Iterator[tuple[str, Mapping[str, Any] | str]]  # a row, or what is wrong with it, and where it stands


def read_question_set(path: str) -> Iterator[QuestionRecord]:
    """The records of a file, or of all files of a folder by name; local or fsspec.

    A row has fields of IMAGE_FIELDS and either a list of questions in one of LIST_FIELDS, or ``question``,
    ``options`` or ``choices`` (a list, or one as JSON text; if there are none, they are the lines "- A) ..." at the
    question's end), ``answer`` and maybe ``kind``. A question in a list is such an object or a pair [question, answer].
    Where the row has the image's bytes, their uid names it. JSON lists are held in memory, all else is streamed.

    Raises BadInput at once where a file cannot be read, is empty or holds nothing of the kind; later where it is found
    to be damaged.
    """
    return chain.from_iterable([_records(file) for file in _files(path)])


def _files(path: str) -> list[str]:
    try:
        fs, inner = url_to_fs(path)
        if fs.isfile(inner):
            found = [path]
        elif fs.isdir(inner):
            names = sorted(str(name) for name in fs.find(inner))
            names = [name for name in names if _extension(name) in EXTENSIONS]
            found = [fs.unstrip_protocol(name) if "://" in path else name for name in names]
        else:
            raise BadInput(f"{path}: no such file or folder; name a question set ({', '.join(EXTENSIONS)})")
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(f"{path}: cannot be opened ({error}); check the path") from None
    if not found or _extension(found[0]) not in EXTENSIONS:
        raise BadInput(f"{path}: no question set; give a file or folder of {', '.join(EXTENSIONS)}")
    return found


def _extension(path: str) -> str:
    return path.rpartition(".")[2].lower()


# --- files -----------------------------------------------------------------------------------------------------------


def _records(file: str) -> Iterator[QuestionRecord]:
    """The records of one file, which is looked into at once, up to its first record that is what we take."""
    read = _reader(file)
    count = 0
    for _, row in _guarded(file, read):
        if not isinstance(row, str) and _asks(row) and any(name in row for name in IMAGE_FIELDS):
            return (_record(where, row) for where, row in _guarded(file, read))
        count += 1
    if count == 0:
        raise BadInput(f"{file}: holds no record; give a file that holds questions")
    what = f"an image ({', '.join(IMAGE_FIELDS)}) and a question (question, {', '.join(LIST_FIELDS)})"
    raise BadInput(f"{file}: no question set, none of its {count} records has {what}; rename its fields")


def _asks(row: Mapping[str, Any]) -> bool:
    return "question" in row or any(name in row for name in LIST_FIELDS)


def _reader(file: str) -> Callable[[], Located]:
    extension = _extension(file)
    if extension == "parquet":
        return lambda: _numbered(file, _parquet(file))
    if extension in ("csv", "tsv"):
        return lambda: _numbered(file, _csv(file))
    return lambda: _json(file)


def _guarded(file: str, read: Callable[[], Located]) -> Located:
    number = 0
    try:
        for row in read():
            yield row
            number += 1
    except (OSError, pa.ArrowException, csv.Error, ValueError, RecursionError) as error:
        text = f"{file}: cannot be read after record {number} ({' '.join(str(error).split())[:300]})"
        raise BadInput(f"{text}; restore it, or leave it out") from None


def _numbered(file: str, rows: Rows) -> Located:
    for number, row in enumerate(rows):
        yield f"{file}[{number}]", row


def _parquet(file: str) -> Rows:
    with open_parquet(file) as parquet:
        for batch in parquet.iter_batches(_BATCH, use_threads=False):
            yield from batch.to_pylist()


def _csv(file: str) -> Rows:
    for row in csv_rows(file)[1]:
        yield row if isinstance(row, str) else {name: mended(value, []) for name, value in row.items()}


def _json(file: str) -> Located:
    """A list if the text begins like one, else an object a line."""
    with open_binary(file) as stream:
        head = stream.read(100).removeprefix(codecs.BOM_UTF8).lstrip()
        stream.seek(0)
        if not head.startswith(b"["):
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{file}:{number}", json_row(line)
            return
        for number, row in enumerate(json.load(stream)):
            yield f"{file}[{number}]", row if isinstance(row, dict) else f"a {type(row).__name__}, not an object"


# --- records ---------------------------------------------------------------------------------------------------------


def _record(where: str, row: Mapping[str, Any] | str) -> QuestionRecord:
    if isinstance(row, str):
        return QuestionRecord((), (_faulty(f"the record cannot be read: {row}"),), "", where)
    return QuestionRecord(_images(row), tuple(_questions(row)), _raw(row), where)


def _faulty(reason: str) -> RawQuestion:
    return RawQuestion(None, None, None, fault=(QuestionStatus.MALFORMED, reason))


def _raw(row: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(jsonable(row), ensure_ascii=False)
    except RecursionError:
        return '"(nested too deeply to be kept)"'
    return text.encode("utf-8", "replace").decode()


def _images(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the record's image; none where it has several images."""
    names: list[str] = []
    for field in IMAGE_FIELDS:
        value = row.get(field)
        if isinstance(value, list):
            if len(value) > 1:
                return ()
            value = value[0] if value else None
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(data, bytes):
            names.insert(0, uid_of(data))
        name = value.get("path") if isinstance(value, Mapping) else value
        name = str(name) if type(name) is int else name
        if isinstance(name, str) and 0 < len(name) <= _MAX_NAME and name not in names:
            names.append(name)
    return tuple(names)


def _questions(row: Mapping[str, Any]) -> Iterator[RawQuestion]:
    field = next((field for field in LIST_FIELDS if row.get(field) is not None), None)
    if field is None or row.get("question") is not None:
        yield _question(row)
        return
    entries = _from_json(row[field])
    if isinstance(entries, Mapping) and "ground_truth" in entries:
        entries = _from_json(entries["ground_truth"])
    if not isinstance(entries, list):
        yield _faulty(f"{field!r} is of type {type(entries).__name__}, not a list of questions")
    elif not entries:
        yield _faulty(f"{field!r} has no question")
    else:
        yield from map(_question, entries)


def _question(entry: object) -> RawQuestion:
    if isinstance(entry, list) and len(entry) == 2:
        entry = {"question": entry[0], "answer": entry[1]}
    if not isinstance(entry, Mapping):
        return _faulty(f"a question of type {type(entry).__name__}, not an object or a pair")
    text, answer, kind = entry.get("question"), entry.get("answer"), entry.get("kind")
    options = next((entry[field] for field in OPTION_FIELDS if entry.get(field) not in (None, "")), None)
    if options is None and isinstance(text, str):
        return _with_option_lines(text, answer, kind)
    return RawQuestion(text, _from_json(options), answer, kind)


def _with_option_lines(text: str, answer: object, kind: object) -> RawQuestion:
    """Options from the text's end. The question is all that is before the last line labelled A, however many lines."""
    lines = text.splitlines()
    matches = [_OPTION_LINE.fullmatch(line) for line in lines]
    start = next((n for n in reversed(range(len(lines))) if (match := matches[n]) and match["label"] == "A"), None)
    if start is None:
        return RawQuestion(text, None, answer, kind)
    head = "\n".join(lines[:start])
    options = [line.strip() for line in lines[start:] if line.strip()]
    other = next((line for line in options if _OPTION_LINE.fullmatch(line) is None), None)
    fault = other and (QuestionStatus.BAD_OPTIONS, f"a line after the first option is none: {other!r}")
    return RawQuestion(head, options, answer, kind, fault or None)


def _from_json(value: object) -> object:
    """What a text that holds a JSON list or object says; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        parsed: object = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed
