"""Captions of image files: rows of ImageFolder's ``metadata.jsonl``, or fields of a ``.json`` sidecar."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...manifests.files.outside import ANYWHERE, Reach, is_url, refusal
from ...manifests.files.stores import filesystem
from ...manifests.sidecars import jsonable
from ...manifests.status import Status
from ..reading.bounded_rows import TOO_DEEP
from ..reading.columns import Columns, take_caption
from ..reading.files import join
from . import tables
from .source_refs import FileRef, Handles, Item, ItemRef, ProblemRef, TarRef

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # column of image paths, relative to the metadata's folder


@dataclass(frozen=True, slots=True)
class DescribedRef:
    """A file with its metadata row: ``meta`` is the row without the caption, as JSON. ``named``: the caption is from
    the column given by the user, and takes precedence over the file's own."""

    file: FileRef
    named: bool
    text: str | None
    url: str | None
    meta: str

    @property
    def source(self) -> str:
        return self.file.source

    def identity(self) -> str:
        return json.dumps(["described", self.file.identity(), self.text, self.url, self.meta])

    def identity_unread(self) -> str:
        return json.dumps(["described", self.file.identity_unread(), self.text, self.url, self.meta])

    def load(self, handles: Handles) -> Item:
        """Load the file; its own sidecars take precedence over the metadata row."""
        item = self.file.load(handles)
        item.text = self.text if self.named or item.text is None else item.text
        item.url = item.url or self.url
        item.meta = {**json.loads(self.meta), **item.meta}
        return item


@dataclass(frozen=True, slots=True)
class CaptionedRef:
    """An image whose caption is a field of its ``.json`` sidecar."""

    image: FileRef | TarRef
    field: str

    @property
    def source(self) -> str:
        return self.image.source

    def identity(self) -> str:
        return self.image.identity()

    def identity_unread(self) -> str:
        return self.image.identity_unread() if isinstance(self.image, FileRef) else self.image.identity()

    def load(self, handles: Handles) -> Item:
        item = self.image.load(handles)
        item.text, whole = take_caption(item.meta, self.field)
        if item.text is None:
            item.notes.append(f"no text in {self.field!r} of its json")
        elif whole is not None:
            del item.meta[whole]
        return item


def with_sidecar_captions(refs: Iterator[ItemRef], columns: Columns) -> Iterator[ItemRef]:
    """Take the captions of files and tar members from the JSON field given by the user."""
    if columns.text is None:
        return refs
    field = columns.text
    return (CaptionedRef(ref, field) if isinstance(ref, (FileRef, TarRef)) else ref for ref in refs)


def with_metadata(
    root: str, refs: Iterator[ItemRef], columns: Columns, inside: Reach = ANYWHERE, names: Reach = ANYWHERE
) -> Iterator[ItemRef]:
    """Join a folder's images with the metadata of their folder or of a parent folder.

    Metadata files are not items; their rows for missing files, and rows that cannot be read, are items at the end. All
    metadata is held in memory. ``inside``: the permitted locations of metadata files; ``names``: those of the paths in
    them.

    Raises BadInput if metadata cannot be read; for that of ``root`` itself before the first item.
    """
    metadata = _Found(root, columns, inside, names)
    metadata.of("")
    return _joined(metadata, refs)


def _joined(metadata: _Found, refs: Iterator[ItemRef]) -> Iterator[ItemRef]:
    for ref in refs:
        if not isinstance(ref, FileRef):
            yield ref
        elif not metadata.is_metadata(ref.name):
            yield metadata.described(ref)
    yield from metadata.rest()


class _Metadata:
    """One metadata file; ``name`` and its ``folder`` are relative to the source's root."""

    def __init__(self, root: str, folder: str, name: str, rows: tables.Rows) -> None:
        self.name, self.folder = name, folder
        self.rows: dict[str, Mapping[str, Any]] = {}
        self.faults: list[ItemRef] = []
        for number, row in enumerate(rows):
            file = row if isinstance(row, str) else row.get(FILE_NAME)
            where = f"{join(root, name)}[{number}]"
            if isinstance(row, str):
                self.faults.append(ProblemRef(where, tables.status_of(row), row))
            elif not isinstance(file, str) or not file:
                self.faults.append(ProblemRef(where, Status.CORRUPT, f"no path in column {FILE_NAME!r}"))
            elif (plain := _jsonable(row)) is None:
                self.faults.append(ProblemRef(where, Status.UNSUPPORTED, TOO_DEEP))
            elif self.rows.setdefault(_plain(file), plain) is not plain:
                self.faults.append(ProblemRef(where, Status.UNSUPPORTED, f"a row before it is about {file!r}, too"))
        self.unused = dict.fromkeys(self.rows)


class _Found:
    """Metadata of a source's folders, each looked up once."""

    def __init__(self, root: str, columns: Columns, inside: Reach, names: Reach) -> None:
        self._root, self._columns, self._inside, self._names = root, columns, inside, names
        self._by_folder: dict[str, _Metadata | None] = {}

    def of(self, folder: str) -> _Metadata | None:
        if folder not in self._by_folder:
            self._by_folder[folder] = self._read(folder)
        return self._by_folder[folder]

    def is_metadata(self, name: str) -> bool:
        metadata = self.of(posixpath.dirname(name)) if posixpath.basename(name) in METADATA else None
        return metadata is not None and metadata.name == name

    def described(self, ref: FileRef) -> ItemRef:
        """The file with its row from the nearest folder; the file alone if it has no row."""
        folder, row = posixpath.dirname(ref.name), None
        while True:
            metadata = self.of(folder)
            if metadata is not None:
                name = _plain(ref.name[len(folder) :].lstrip("/"))
                metadata.unused.pop(name, None)
                row = metadata.rows.get(name) if row is None else row
            if not folder:
                return ref if row is None else self._joined(ref, row)
            folder = posixpath.dirname(folder)

    def rest(self) -> Iterator[ItemRef]:
        """Faulty rows, and rows for files that do not exist."""
        for metadata in [entry for entry in self._by_folder.values() if entry is not None]:
            yield from metadata.faults
            for name in metadata.unused:
                row = metadata.rows[name]
                name = row[FILE_NAME] if is_url(row[FILE_NAME]) else join(metadata.folder, row[FILE_NAME])
                yield self._joined(FileRef(self._root, name, None, reach=self._names), row)

    def _joined(self, ref: FileRef, row: Mapping[str, Any]) -> DescribedRef:
        text, whole = take_caption(row, self._columns.text)
        url = row.get("url")
        meta = {name: value for name, value in row.items() if name not in (whole, FILE_NAME)}
        encoded = json.dumps(meta, ensure_ascii=False)
        return DescribedRef(ref, self._columns.text is not None, text, url if isinstance(url, str) else None, encoded)

    def _read(self, folder: str) -> _Metadata | None:
        for name in METADATA:
            path = join(self._root, join(folder, name))
            if not _is_file(path, self._inside):
                continue
            columns, rows = tables.rows_of(path)
            if FILE_NAME in columns:  # else it is some other table
                self._columns.check_text(path, columns)
                try:
                    return _Metadata(self._root, folder, join(folder, name), rows)
                except tables.DAMAGE as error:
                    raise BadInput(f"{path}: damaged ({error}); restore it, or move it elsewhere") from None
        return None


def _is_file(path: str, inside: Reach) -> bool:
    """True if there is a file inside its folder: a link that leaves the folder is an item with that error."""
    if "://" not in path:
        return Path(path).is_file() and refusal(path, inside) is None
    fs, inner = filesystem(path)
    return fs.isfile(inner)


def _jsonable(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row as JSON values; None if it is nested too deeply."""
    try:
        plain: dict[str, Any] = jsonable(row)
        json.dumps(plain)
    except RecursionError:
        return None
    return plain


def _plain(name: str) -> str:
    """A name normalised for comparison: macOS and most tables use different Unicode forms for accents."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))
