"""Items, the inputs of ingest's rows: first a lightweight reference, then bytes.

A reference has an item's location but no image, so ten thousand of them fit into one message to a worker. Resuming
compares its ``identity``, which changes with the item, but not when the whole source is moved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol, TypeVar, runtime_checkable

from ...manifests.files.compressed import plain
from ...manifests.files.outside import ANYWHERE, Reach, is_url
from ...manifests.files.tar import printable
from ...manifests.sidecars import first_text, fits, read_sidecars
from ...manifests.status import Status
from ...models.images.formats import HEAD_BYTES, ImageProblem
from ..reading.files import join, open_binary, read_file, read_head
from ..reading.parquet_cells import ParquetCells

T = TypeVar("T")


@dataclass(slots=True)
class Item:
    """A loaded item: the image's bytes, or the ``problem`` instead. ``notes``: faults that do not affect the image."""

    source: str
    data: bytes | None = field(default=None, repr=False)
    text: str | None = None
    url: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    problem: ImageProblem | None = None
    notes: list[str] = field(default_factory=list)

    def take_sidecars(self, text: bytes | None, meta: bytes | None) -> None:
        """Fill text, url and metadata from a ``.txt`` and a ``.json``."""
        self.text, parsed = read_sidecars(text, meta, self.notes)
        self.meta = parsed or {}
        self.url = self.url or first_text(self.meta, ("url",))


class Handles:
    """Open tar, table and dataset of a worker, cached from item to item. A context manager."""

    def __init__(self) -> None:
        self._tar: tuple[str, BinaryIO] | None = None
        self._cells: tuple[tuple[str, str], ParquetCells] | None = None
        self._dataset: tuple[tuple[str, str], Any] | None = None

    def tar(self, url: str) -> BinaryIO:
        if self._tar is None or self._tar[0] != url:
            self._close_tar()
            self._tar = url, plain(open_binary(url))
        return self._tar[1]

    def dataset(self, split: tuple[str, str], load: Callable[[str, str], T]) -> T:
        """The cached dataset, or ``load(*split)`` if ``split`` (location and split name) is another one."""
        if self._dataset is None or self._dataset[0] != split:
            self._dataset = split, load(*split)
        kept: T = self._dataset[1]
        return kept

    def cells(self, table: str, column: str) -> ParquetCells:
        if self._cells is None or self._cells[0] != (table, column):
            self._close_cells()
            self._cells = (table, column), ParquetCells(table, column)
        return self._cells[1]

    def _close_cells(self) -> None:
        if self._cells is not None:
            self._cells[1].close()
            self._cells = None

    def _close_tar(self) -> None:
        if self._tar is not None:
            self._tar[1].close()
            self._tar = None

    def __enter__(self) -> Handles:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_tar()
        self._close_cells()


class ItemRef(Protocol):
    """Location of an item. An error raised by ``load`` becomes the row's error (:mod:`..reading.faults`)."""

    @property
    def source(self) -> str: ...

    def identity(self) -> str: ...

    def load(self, handles: Handles) -> Item: ...


@runtime_checkable
class Rereadable(Protocol):
    """An item whose size an earlier run may not have been able to read."""

    def identity_unread(self) -> str:
        """The identity that it had in that run."""
        ...


@dataclass(frozen=True, slots=True)
class ProblemRef:
    """An item known to be unusable before reading: a damaged part of a tar, a folder that cannot be listed."""

    name: str
    status: Status
    reason: str

    @property
    def source(self) -> str:
        return printable(self.name)

    def identity(self) -> str:
        return json.dumps(["problem", self.source.rpartition("/")[2], self.status])

    def load(self, handles: Handles) -> Item:
        return Item(self.source, problem=ImageProblem(self.status, self.reason))


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A sidecar file of an image: its ``name`` in the image's folder, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class GoneRef:
    """An item that could not be read when it was ingested, and is no longer in its source."""

    name: str

    @property
    def source(self) -> str:
        return self.name

    def identity(self) -> str:
        return json.dumps(["gone", self.name])

    def load(self, handles: Handles) -> Item:
        return Item(self.name, problem=ImageProblem(Status.MISSING, "its source lists it no more"))


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file ``name`` under ``root``; ``text`` and ``meta`` are its sidecars, if any.

    ``size`` None: stat failed, so its sidecars are unknown as well. ``reach``: the permitted targets of its links.
    ``own``: the user gave the file itself, which may be a link to anywhere; its sidecars may not.
    """

    root: str
    name: str
    size: int | None
    text: Sidecar | None = None
    meta: Sidecar | None = None
    reach: Reach = ANYWHERE
    own: bool = False

    @property
    def source(self) -> str:
        return printable(join(self.root, self.name))

    def identity(self) -> str:
        text, meta = (sidecar.size if sidecar else None for sidecar in (self.text, self.meta))
        return json.dumps(["file", self.name, self.size, text, meta])

    def identity_unread(self) -> str:
        return json.dumps(["file", self.name, None, None, None])

    def load(self, handles: Handles) -> Item:
        item = Item(self.source)
        folder = self.name[: self.name.rfind("/") + 1]
        text, meta = (self._sidecar(folder, sidecar, item.notes) for sidecar in (self.text, self.meta))
        item.take_sidecars(text, meta)
        item.data, item.problem = read_file(self.name, self.root, None if self.own else self.reach)
        return item

    def head(self) -> bytes | None:
        """First bytes, see :func:`read_head`."""
        return read_head(self.name, self.root, None if self.own else self.reach)

    def _sidecar(self, folder: str, sidecar: Sidecar | None, notes: list[str]) -> bytes | None:
        if sidecar is None:
            return None
        kind = sidecar.name.rpartition(".")[2]
        if not fits(kind, sidecar.size, notes):
            return None
        data, problem = read_file(folder + sidecar.name, self.root, self.reach)
        if problem is not None:
            notes.append(f"{kind} {problem.reason}")
        return data


@dataclass(frozen=True, slots=True)
class Extent:
    """A tar member: ``size`` bytes at ``offset``."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarRef:
    """An image in a tar with its sidecar members. ``ignored``: extensions of members that are not kept."""

    url: str
    image: Extent
    text: Extent | None = None
    meta: Extent | None = None
    ignored: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        return printable(f"{self.url}/{self.image.name}")

    def identity(self) -> str:
        places = [(e.name, e.offset, e.size) if e else None for e in (self.image, self.text, self.meta)]
        return json.dumps(["tar", self.url.rpartition("/")[2], places])

    def head(self, handles: Handles) -> bytes:
        """The image's first bytes. Raises OSError."""
        extent = Extent(self.image.name, self.image.offset, min(self.image.size, HEAD_BYTES))
        return _read_extent(handles.tar(self.url), extent)

    def load(self, handles: Handles) -> Item:
        stream = handles.tar(self.url)
        item = Item(self.source)
        text, meta = (
            extent if extent and fits(kind, extent.size, item.notes) else None
            for kind, extent in (("text", self.text), ("json", self.meta))
        )
        extents = {extent for extent in (self.image, text, meta) if extent is not None}
        # In tar order: seeking backwards in a compressed one is expensive.
        read = {extent: _read_extent(stream, extent) for extent in sorted(extents, key=lambda extent: extent.offset)}
        item.take_sidecars(*(read[extent] if extent else None for extent in (text, meta)))
        if self.ignored:
            item.notes.append(f"members not kept: {', '.join(self.ignored)}")
        item.data = read[self.image]
        return item


@dataclass(frozen=True, slots=True)
class TableRef:
    """A row of a table; ``path`` is relative to ``root`` unless absolute, ``meta`` the other columns as JSON.
    ``reach``: the permitted locations of the path."""

    table: str
    row: int
    root: str
    path: str
    text: str | None
    url: str | None
    meta: str
    notes: tuple[str, ...] = ()
    reach: Reach = ANYWHERE

    @property
    def source(self) -> str:
        return printable(self.path if is_url(self.path) else join(self.root, self.path))

    def identity(self) -> str:
        return json.dumps(["table", self.path, self.text, self.url, self.meta])

    def head(self) -> bytes | None:
        """First bytes, see :func:`read_head`."""
        return read_head(self.path, self.root, self.reach)

    def load(self, handles: Handles) -> Item:
        data, problem = read_file(self.path, self.root, self.reach)
        return Item(self.source, data, self.text, self.url, json.loads(self.meta), problem, list(self.notes))


def identities(ref: ItemRef) -> Iterator[str]:
    """An item's identity, then the one it may have had in an earlier run."""
    yield ref.identity()
    if isinstance(ref, Rereadable):
        yield ref.identity_unread()


def stem_of(name: str) -> str:
    """``a/b.c.jpg`` to ``a/b.c``: the name that a file shares with its sidecars."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.rpartition('.')[0] or file}"


def _read_extent(stream: BinaryIO, extent: Extent) -> bytes:
    stream.seek(extent.offset)
    data = stream.read(extent.size)
    if len(data) < extent.size:
        raise OSError(f"the tar has only {len(data)} of {extent.size} bytes of {extent.name}: did it change?")
    return data
