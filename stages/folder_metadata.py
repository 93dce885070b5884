"""ImageFolder's ``metadata.jsonl``, ``.csv`` or ``.parquet``: what a folder's images are called and say, row by row."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from ..errors import BadInput
from ..manifests.sidecars import jsonable
from ..manifests.status import Status
from . import tables
from .columns import Columns, take_caption
from .items import FileRef, Handles, Item, ItemRef, ProblemRef, join

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # the column that names an image, from where the metadata lies


@dataclass(frozen=True, slots=True)
class DescribedRef:
    """A file with its row of the metadata: ``meta`` is all of it but the caption, as JSON."""

    file: FileRef
    text: str | None
    url: str | None
    meta: str

    @property
    def source(self) -> str:
        return self.file.source

    def identity(self) -> str:
        return json.dumps(["described", self.file.identity(), self.text, self.url, self.meta])

    def load(self, handles: Handles) -> Item:
        """The file's own sidecars say more than a row that is about many files."""
        item = self.file.load(handles)
        item.text = item.text if item.text is not None else self.text
        item.url = item.url or self.url
        item.meta = {**json.loads(self.meta), **item.meta}
        return item


def with_metadata(root: str, refs: Iterator[ItemRef], columns: Columns) -> Iterator[ItemRef]:
    """The items of a folder, its images joined with the metadata of their folder or of one above it.

    Metadata is no item itself; its rows about files that are not there, or that cannot be read, are items at the end.
    It is held in memory. Raises BadInput where it cannot be read, at once for that of ``root`` itself.
    """
    found = _Found(root, columns)
    found.of("")
    return _joined(found, refs)


def _joined(found: _Found, refs: Iterator[ItemRef]) -> Iterator[ItemRef]:
    for ref in refs:
        if not isinstance(ref, FileRef):
            yield ref
        elif not found.is_metadata(ref.name):
            yield found.described(ref)
    yield from found.rest()


class _Metadata:
    """One metadata file, ``name`` from the source's root, in ``folder``."""

    def __init__(self, root: str, folder: str, name: str, rows: tables.Rows) -> None:
        self.name, self.folder = name, folder
        self.rows: dict[str, Mapping[str, Any]] = {}
        self.faults: list[ItemRef] = []
        for number, row in enumerate(rows):
            file = row if isinstance(row, str) else row.get(FILE_NAME)
            where = f"{join(root, name)}[{number}]"
            if isinstance(row, str):
                self.faults.append(ProblemRef(where, Status.CORRUPT, row))
            elif not isinstance(file, str) or not file:
                self.faults.append(ProblemRef(where, Status.CORRUPT, f"no path in column {FILE_NAME!r}"))
            elif self.rows.setdefault(_plain(file), row) is not row:
                self.faults.append(ProblemRef(where, Status.UNSUPPORTED, f"a row before it is about {file!r}, too"))
        self.unused = dict.fromkeys(self.rows)


class _Found:
    """The metadata of a source's folders, each looked for once."""

    def __init__(self, root: str, columns: Columns) -> None:
        self._root, self._columns = root, columns
        self._by_folder: dict[str, _Metadata | None] = {}

    def of(self, folder: str) -> _Metadata | None:
        if folder not in self._by_folder:
            self._by_folder[folder] = self._read(folder)
        return self._by_folder[folder]

    def is_metadata(self, name: str) -> bool:
        found = self.of(posixpath.dirname(name)) if posixpath.basename(name) in NAMES else None
        return found is not None and found.name == name

    def described(self, ref: FileRef) -> ItemRef:
        """The file with its row, that of the nearest folder; the file alone where none is about it."""
        folder, row = posixpath.dirname(ref.name), None
        while True:
            found = self.of(folder)
            name = _plain(posixpath.relpath(ref.name, folder) if folder else ref.name)
            if found is not None and name in found.rows:
                found.unused.pop(name, None)
                row = found.rows[name] if row is None else row
            if not folder:
                return ref if row is None else self._joined(ref, row)
            folder = posixpath.dirname(folder)

    def rest(self) -> Iterator[ItemRef]:
        """What the metadata has beside rows about the files that are there."""
        for found in [each for each in self._by_folder.values() if each is not None]:
            yield from found.faults
            for name in found.unused:
                row = found.rows[name]
                yield self._joined(FileRef(self._root, join(found.folder, row[FILE_NAME]), 0), row)

    def _joined(self, ref: FileRef, row: Mapping[str, Any]) -> DescribedRef:
        text, whole = take_caption(row, self._columns.text)
        url = row.get("url")
        meta = jsonable({name: value for name, value in row.items() if name not in (whole, FILE_NAME)})
        encoded = json.dumps(meta, ensure_ascii=False)
        return DescribedRef(ref, text, url if isinstance(url, str) else None, encoded)

    def _read(self, folder: str) -> _Metadata | None:
        for name in NAMES:
            path = join(self._root, join(folder, name))
            if not _is_file(path):
                continue
            columns, rows = tables.rows_of(path)
            if FILE_NAME in columns:  # else it is a table of another kind
                self._columns.check_text(path, columns)
                try:
                    return _Metadata(self._root, folder, join(folder, name), rows)
                except tables.DAMAGE as error:
                    raise BadInput(f"{path}: damaged ({error}); restore it, or move it elsewhere") from None
        return None


def _is_file(path: str) -> bool:
    if "://" not in path:
        return Path(path).is_file()
    fs, inner = url_to_fs(path)
    return bool(fs.isfile(inner))


def _plain(name: str) -> str:
    """A name as it is compared: macOS writes accents in another form than most tables do."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))
