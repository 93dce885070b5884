"""Croissant metadata of an export (JSON-LD): files with their hashes, record sets, licence, citation, provenance.

The format is MLCommons' Croissant 1.0, with its vocabulary for responsible AI (RAI) for how the data were made. Nothing
in it is a time unless the author names one: the same export has the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from typing import Any

import pyarrow as pa

from .card import CardWords, citation
from .provenance import Step, public

CROISSANT = "croissant.json"
MOST_FILES = 2000  # files listed one by one, with their hashes; a reader's graph has a node for each
LISTINGS, PAIRS = "listings", "pairs"  # ids of a file set and of a record set
_RAI = "http://mlcommons.org/croissant/RAI/"

#: The context that all Croissant files of version 1.0 have.
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": _RAI,
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "equivalentProperty": "cr:equivalentProperty",
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}

_ENCODINGS = {
    "parquet": "application/x-parquet",
    "tar": "application/x-tar",
    "json": "application/json",
    "jsonl": "application/jsonlines",
    "md": "text/markdown",
    "yaml": "application/yaml",
}


@dataclass(frozen=True)
class Described:
    """What is described. ``files``: published ones by name, with ``bytes`` and ``sha256``; ``rows``: schema of the
    listings; ``data``: that of the files in ``data/``, for Parquet; ``images``: their extensions in tars."""

    format: str
    summary: str
    files: Mapping[str, Mapping[str, Any]]
    rows: pa.Schema
    data: pa.Schema | None = None
    images: Sequence[str] = field(default=())


def croissant(words: CardWords, what: Described, steps: Sequence[Step]) -> bytes:
    """Contents of ``croissant.json``."""
    listed = what.files if len(what.files) <= MOST_FILES else {}
    tars = [name for name in listed if name.endswith(".tar")]
    about = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": words.title,
        "description": what.summary,
        "conformsTo": ["http://mlcommons.org/croissant/1.0", f"{_RAI}1.0"],
        "license": words.license,
        "citeAs": citation(words),
        "creator": [{"@type": "sc:Person", "name": name} for name in words.creators],
        "datePublished": words.published,
        "inLanguage": list(words.languages),
        "rai:dataPreprocessingProtocol": [_protocol(step) for step in steps],
        "rai:machineAnnotationTools": sorted({model for step in steps if (model := _model(step))}),
        "distribution": [*_objects(listed), *_file_sets(what, tars)],
        "recordSet": [*_pairs(what, tars), _records("rows", _columns(what.rows, "rows", LISTINGS))],
    }
    kept = {name: value for name, value in about.items() if value not in (None, [], "")}
    return json.dumps(kept, indent=1, ensure_ascii=False).encode() + b"\n"


def _protocol(step: Step) -> str:
    print_ = f", fingerprint {step.fingerprint}" if step.fingerprint else ""
    model = _model(step)
    return f"{step.stage}: {step.name}{print_}" + (f", model {model}" if model else "")


def _model(step: Step) -> str:
    model = step.config["run"].get("model") if step.config is not None else None
    return str(public(model)) if isinstance(model, str) and model else ""


def _objects(files: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for name, file in files.items():
        yield {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name,
            "contentUrl": name,
            "contentSize": f"{file['bytes']} B",
            "encodingFormat": _ENCODINGS.get(name.rpartition(".")[2], "application/octet-stream"),
            "sha256": file["sha256"],
        }


def _file_sets(what: Described, tars: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Sets of files that record sets are made of, and of those that no manifest lists one by one."""
    listings = [name for name in what.files if name.endswith(".parquet")]
    yield _file_set(LISTINGS, "parquet", _patterns(name for name in listings if "/" not in name))
    if what.data is not None:
        yield _file_set("data-files", "parquet", _patterns(name for name in listings if "/" in name))
    if tars:
        within = [{"@id": name} for name in tars]
        yield {**_file_set("images", "", [f"*.{extension}" for extension in what.images]), "containedIn": within}
    if what.format in ("llava", "messages", "folder"):
        yield _file_set("images", "", "images/*")
    if what.format == "lance":
        yield _file_set("table", "", "train.lance/*")


def _patterns(names: Iterable[str]) -> list[str]:
    """Patterns that match files of these names and none elsewhere: in Croissant's, `*` matches folders, too."""
    return sorted({re.sub("[0-9]", "[0-9]", escape(name)) for name in names})


def _file_set(id_: str, kind: str, includes: str | list[str]) -> dict[str, Any]:
    encoding = _ENCODINGS.get(kind, "application/octet-stream")
    return {"@type": "cr:FileSet", "@id": id_, "name": id_, "encodingFormat": encoding, "includes": includes}


def _records(id_: str, fields: Iterable[dict[str, Any]], key: str = "key") -> dict[str, Any]:
    return {"@type": "cr:RecordSet", "@id": id_, "name": id_, "key": {"@id": f"{id_}/{key}"}, "field": list(fields)}


def _pairs(what: Described, tars: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Record set of images and captions, of formats for which Croissant's readers have one."""
    if what.data is not None:
        columns = _columns(what.data, PAIRS, "data-files")
        image = _field(PAIRS, "image", "sc:ImageObject", "data-files", {"column": "image"}, {"jsonPath": "bytes"})
        yield _records(PAIRS, [image, *columns])
    if tars:
        yield _records(PAIRS, _of_tars(what))


def _of_tars(what: Described) -> Iterator[dict[str, Any]]:
    """Fields of samples in tars: an image is joined with its listing by its name without the extension."""
    ending = "|".join(map(re.escape, what.images))
    name = {"fileProperty": "fullpath"}
    key = _field(PAIRS, "key", "sc:Text", "images", name, {"regex": rf"^(.+)\.(?:{ending})$"})
    listed = [column for column in ("uid", "caption") if column in what.rows.names]
    yield {**key, "references": _source(LISTINGS, {"column": "key"})}
    yield _field(PAIRS, "image", "sc:ImageObject", "images", {"fileProperty": "content"})
    for column in listed:
        yield _field(PAIRS, column, "sc:Text", LISTINGS, {"column": column})


def _columns(schema: pa.Schema, records: str, files: str) -> Iterator[dict[str, Any]]:
    """Fields of a table's columns; without those of lists of structures, for which there is no type."""
    for column in schema:
        many = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        kind = _data_type(column.type.value_type if many else column.type)
        if kind is not None:
            found = _field(records, column.name, kind, files, {"column": column.name})
            yield {**found, "repeated": True} if many else found


def _data_type(kind: pa.DataType) -> str | None:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "sc:Text"
    if pa.types.is_floating(kind):
        return "sc:Float"
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    return "sc:Integer" if pa.types.is_integer(kind) else None


def _field(
    records: str,
    name: str,
    kind: str,
    files: str,
    extract: Mapping[str, str],
    transform: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    source = {**_source(files, extract), **({"transform": transform} if transform else {})}
    return {"@type": "cr:Field", "@id": f"{records}/{name}", "name": name, "dataType": kind, "source": source}


def _source(files: str, extract: Mapping[str, str]) -> dict[str, Any]:
    return {"fileSet": {"@id": files}, "extract": extract}
