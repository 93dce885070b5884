"""Streaming import of external question sets: CapRL's layouts, and one question per row as JSON, Parquet or CSV.

No fault of a record is fatal: it becomes a question that :func:`checked` refuses with its reason.
"""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa

from ...errors import BadInput
from ...manifests.files.outside import ANYWHERE, Outside, Reach, Refused, is_url, open_local, source_folder
from ...manifests.files.storage import open_parquet
from ...manifests.files.stores import filesystem
from ...manifests.shards import uid_of
from ...manifests.sidecars import jsonable, repaired
from ...models.images.formats import HEAD_BYTES, ImageProblem, sniff
from ..ingest.tables import Rows, csv_rows
from ..reading import coco
from ..reading.bounded_rows import Beyond, bounded_lines, json_row
from ..reading.conversations import CONVERSATION_COLUMNS, exchanges, from_json, images_in
from ..reading.files import open_binary
from ..reading.json_files import begins_list, list_items, whole_object
from .layouts import ANSWER_FIELDS, CHART_FIELDS, INDEX_FIELDS, faulty, read_question
from .validate import RawQuestion

EXTENSIONS = ("json", "jsonl", "ndjson", "parquet", "csv", "tsv")
_PATHS = ("image_path", "image", "images", "path", "file", "file_name", "filename", "filepath", "imgname")
IMAGE_FIELDS = ("uid", "key", *_PATHS)  # imgname is ChartQA's
ID_FIELDS = ("image_id", "data_id")  # only if nothing else names the image: they may be numbers, like keys
NUMBERED_FIELDS = tuple(f"image_{number}" for number in range(1, 10))  # MMMU's; one of them is filled, or several
LIST_FIELDS = ("qa_list", "questions", "qa", "message", "reward_model", "ground_truth", *CONVERSATION_COLUMNS)
_BATCH = 100  # rows of a Parquet file per batch: they may hold images
_MAX_NAME = 4_096  # characters; a longer "image" is not a path but the image as base64
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


@dataclass(frozen=True, slots=True)
class QuestionRecord:
    """A record of a set: the questions about one image.

    ``images``: all names that it gives for the image, most specific first: uid, key, file name or path; empty if it
    gives none. ``raw``: the record as JSON without the image's bytes. ``where``: "file:line" or "file[row]".
    """

    images: tuple[str, ...]
    questions: tuple[RawQuestion, ...]
    raw: str
    where: str


Located = Iterator[tuple[str, Mapping[str, Any] | str]]  # location, and a row or its error


def read_question_set(path: str) -> Iterator[QuestionRecord]:
    """Records of a file, or of all files of a folder in name order; local or fsspec.

    A row has fields of IMAGE_FIELDS and either a list of questions or a conversation in one of LIST_FIELDS, or is
    itself a question. Questions have the formats of :func:`read_question`. In a conversation, user turns are questions
    and assistant turns their answers. If the row has the image's bytes, their uid names it. An object that holds a list
    of rows is held in memory; everything else is streamed.

    Raises BadInput at once if a file cannot be read, is empty or is not a question set; later if it is damaged.
    """
    return chain.from_iterable([_records(file) for file in _files(path)])


def _files(path: str) -> list[str]:
    try:
        fs, inner = filesystem(path)
        if fs.isfile(inner):
            files = [path]
        elif fs.isdir(inner):
            names = sorted(str(name) for name in fs.find(inner))
            names = [name for name in names if _extension(name) in EXTENSIONS]
            files = [fs.unstrip(name) if "://" in path else name for name in names]
            _refuse_others(path, files)
        else:
            raise BadInput(f"{path}: no such file or folder; name a question set ({', '.join(EXTENSIONS)})")
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(f"{path}: cannot be opened ({error}); check the path") from None
    if not files or _extension(files[0]) not in EXTENSIONS:
        raise BadInput(f"{path}: no question set; give a file or folder of {', '.join(EXTENSIONS)}")
    return files


def _refuse_others(folder: str, files: Iterable[str]) -> None:
    """Raise BadInput if a folder lists a link that leaves it, or an entry that is not a regular file."""
    reach = ANYWHERE if is_url(folder) else Reach(source=source_folder(folder))
    for file in files:
        chained = is_url(file) and "::" in file and "::" not in folder
        try:
            if chained or not is_url(file):
                open_local(file, reach).close()
        except Outside:
            raise BadInput(
                f"{file}: a link that leads out of {folder}; name the files themselves, or copy it"
            ) from None
        except Refused as refused:
            raise BadInput(f"{refused}; move it elsewhere") from None


def _extension(path: str) -> str:
    return path.rpartition(".")[2].lower()


# --- files -----------------------------------------------------------------------------------------------------------


def _records(file: str) -> Iterator[QuestionRecord]:
    """Records of one file; it is checked at once, up to its first record in a supported layout."""
    read = _reader(file)
    count = 0
    for _, row in _guarded(file, read):
        if not isinstance(row, str) and _asks(row) and _names_image(row):
            return (_record(where, row) for where, row in _guarded(file, read))
        count += 1
    if count == 0:
        raise BadInput(f"{file}: holds no record; give a file that holds questions")
    what = f"an image ({', '.join(IMAGE_FIELDS)}) and a question (question, {', '.join(LIST_FIELDS)})"
    raise BadInput(f"{file}: no question set, none of its {count} records has {what}; rename its fields")


def _asks(row: Mapping[str, Any]) -> bool:
    if "question" in row or any(name in row for name in LIST_FIELDS) or all(name in row for name in CHART_FIELDS):
        return True
    return isinstance(row.get("prompt"), str) and any(name in row for name in (*ANSWER_FIELDS, *INDEX_FIELDS))


def _names_image(row: Mapping[str, Any]) -> bool:
    """True if a row has a field for the name of its image, filled or not."""
    return any(name in row for name in (*IMAGE_FIELDS, *NUMBERED_FIELDS, *ID_FIELDS)) or bool(_images(row))


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
    uids: dict[str, str] = {}
    for row in csv_rows(file)[1]:
        if isinstance(row, str):
            yield row
        else:
            yield _with_shared_image({name: repaired(value, []) for name, value in row.items()}, uids)


def _with_shared_image(row: dict[str, str], uids: dict[str, str]) -> dict[str, str]:
    """``row`` with the uid of another row's image if it names that row: VLMEvalKit has each image in base64 once, and
    the ``index`` of its row elsewhere. ``uids``: of the images so far, by ``index``; this one is added."""
    index, image = row.get("index"), row.get("image") or ""
    if index is None or "uid" in row:
        return row
    if image in uids:
        return {**row, "uid": uids[image]}
    data = _decoded(image)
    if data is not None:
        uids[index] = uid_of(data)
    return row


def _json(file: str) -> Located:
    """Rows of a JSON list, of an object that has one, or of JSON lines."""
    if begins_list(file):
        with open_binary(file) as stream:
            for number, row in enumerate(list_items(stream)):
                sound = isinstance(row, dict | Beyond)
                yield f"{file}[{number}]", row if sound else f"a {type(row).__name__}, not an object"
        return
    whole = whole_object(file) if _extension(file) == "json" else None
    if whole is not None:
        yield from _of_object(file, whole)
        return
    with open_binary(file) as stream:
        for number, line in enumerate(bounded_lines(stream), 1):
            if line.strip():
                yield f"{file}:{number}", json_row(line)


def _of_object(file: str, whole: Mapping[str, Any]) -> Located:
    """Rows of ``questions``, ``annotations`` or ``data``, joined with VQA answers and COCO file names."""
    field = next((field for field in ("questions", "annotations", "data") if _objects(whole, field)), None)
    if field is None or _images(whole):
        yield f"{file}:1", whole
        return
    answers = {str(entry["question_id"]): entry for entry in _objects(whole, "annotations") if "question_id" in entry}
    files = coco.file_names(whole)
    for number, row in enumerate(whole[field]):
        if not isinstance(row, dict):
            yield f"{file}[{number}]", f"a {type(row).__name__}, not an object"
            continue
        joined = {**answers.get(str(row.get("question_id")), {}), **row}
        name = files.get(str(joined.get("image_id")))
        yield f"{file}[{number}]", joined if name is None else {"file_name": name, **joined}


def _objects(whole: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    values = whole.get(field)
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []


# --- records ---------------------------------------------------------------------------------------------------------


def _record(where: str, row: Mapping[str, Any] | str) -> QuestionRecord:
    if isinstance(row, str):
        return QuestionRecord((), (faulty(f"the record cannot be read: {row}"),), "", where)
    return QuestionRecord(_images(row), tuple(_questions(row)), _raw(row), where)


def _raw(row: Mapping[str, Any]) -> str:
    held = [name for name in IMAGE_FIELDS if isinstance(row.get(name), str) and len(row[name]) > _MAX_NAME]
    try:
        text = json.dumps(jsonable({name: row[name] for name in row if name not in held}), ensure_ascii=False)
    except RecursionError:
        return '"(nested too deeply to be kept)"'
    return text.encode("utf-8", "replace").decode()


def _images(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the record's image, its uid first; empty if it has several images."""
    values = [row.get(field) for field in IMAGE_FIELDS]
    if not any(value for value in values):
        values = [row[field] for field in NUMBERED_FIELDS if row.get(field)]
        if len(values) > 1:
            return ()
    if not any(value for value in values):
        values = [images_in(row.get(field)) for field in CONVERSATION_COLUMNS]
    if not any(value for value in values):
        values = [row.get(field) for field in ID_FIELDS]
        number = row.get("image_id")
        values += [f"{number:012d}.jpg"] if type(number) is int and number >= 0 else []  # COCO's file name for this id
    names: list[str] = []
    for value in values:
        if isinstance(value, list):
            if len(value) > 1:
                return ()
            value = value[0] if value else None
        data, name = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, value)
        data = _decoded(data) if isinstance(data, str) else data
        if isinstance(data, bytes):
            names.insert(0, uid_of(data))
        name = str(name) if type(name) is int else name
        if isinstance(name, str) and 0 < len(name) <= _MAX_NAME and not _DATA_URI.match(name) and name not in names:
            names.append(name)
    return tuple(names)


def _decoded(text: str) -> bytes | None:
    """Bytes of an image in base64; None for any other text."""
    uri = _DATA_URI.match(text)
    if uri is None and len(text) <= _MAX_NAME:
        return None
    try:
        data = base64.b64decode(text[uri.end() if uri is not None else 0 :], validate=True)
    except ValueError:
        return None
    return None if isinstance(sniff(data[:HEAD_BYTES]), ImageProblem) else data


def _questions(row: Mapping[str, Any]) -> Iterator[RawQuestion]:
    field = next((field for field in LIST_FIELDS if row.get(field) is not None), None)
    if field is None or row.get("question") is not None:
        yield read_question(row)
        return
    entries = from_json(row[field])
    if isinstance(entries, Mapping) and "ground_truth" in entries:
        entries = from_json(entries["ground_truth"])
    said = exchanges(entries)
    if said is not None:
        entries = [{"question": question, "answer": answer} for question, answer in said]
    if not isinstance(entries, list):
        yield faulty(f"{field!r} is of type {type(entries).__name__}, not a list of questions")
    elif not entries:
        yield faulty(f"{field!r} has no question")
    else:
        yield from map(read_question, entries)
