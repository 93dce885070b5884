"""Items: what one row of an ingest comes from, first as a light reference, then as bytes.

A reference says where an item lies and carries no image, so ten thousand of them travel to a worker in one message. Its
``identity`` is what resuming compares: it changes when the item does, not when the whole source moves to another place.
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
    """One item read: the image's bytes, or the ``problem`` that left none. ``notes`` are faults that cost no image."""

    source: str
    data: bytes | None = field(default=None, repr=False)
    text: str | None = None
    url: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    problem: ImageProblem | None = None
    notes: list[str] = field(default_factory=list)

    def take_sidecars(self, text: bytes | None, meta: bytes | None) -> None:
        """Fill text, url and metadata from a ``.txt`` and a ``.json``."""
        self.text, found = read_sidecars(text, meta, self.notes)
        self.meta = found or {}
        self.url = self.url or first_text(self.meta, ("url",))


class Handles:
    """What a worker keeps open from item to item: the tar, the table and the dataset it is in. A context manager."""

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
        """``load(*split)``, where ``split`` (a location and a name there) is not the one that is kept."""
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
    """Where an item lies. What ``load`` raises becomes the row's reason (:mod:`..reading.faults`)."""

    @property
    def source(self) -> str: ...

    def identity(self) -> str: ...

    def load(self, handles: Handles) -> Item: ...


@runtime_checkable
class Rereadable(Protocol):
    """An item that an earlier run may not have been able to look at."""

    def identity_unread(self) -> str:
        """The identity that it had then."""
        ...


@dataclass(frozen=True, slots=True)
class ProblemRef:
    """An item known to be unusable before it is read: a damaged stretch of a tar, a folder that cannot be listed."""

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
    """A file beside an image that belongs to it: its ``name`` in the image's folder, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class GoneRef:
    """An item that could not be read when it was ingested, and which its source has no more."""

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
    """A file ``name`` under ``root``; ``text`` and ``meta`` are its sidecars, where it has them.

    ``size`` None: it could not be looked at, so its sidecars are not known either. ``reach``: how far its links lead.
    ``own``: a user named the file itself, which may be a link to anywhere; its sidecars may not.
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
        """As :func:`read_head`."""
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
    """An image in a tar with the members that belong to it. ``ignored``: extensions of members that are not kept."""

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
        # In the order of the tar: a compressed one is dear to go back in.
        read = {extent: _read_extent(stream, extent) for extent in sorted(extents, key=lambda extent: extent.offset)}
        item.take_sidecars(*(read[extent] if extent else None for extent in (text, meta)))
        if self.ignored:
            item.notes.append(f"members not kept: {', '.join(self.ignored)}")
        item.data = read[self.image]
        return item


@dataclass(frozen=True, slots=True)
class TableRef:
    """A row of a table; ``path`` is relative to ``root`` unless absolute, ``meta`` the other columns as JSON.
    ``reach``: how far the path may lead."""

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
        """As :func:`read_head`."""
        return read_head(self.path, self.root, self.reach)

    def load(self, handles: Handles) -> Item:
        data, problem = read_file(self.path, self.root, self.reach)
        return Item(self.source, data, self.text, self.url, json.loads(self.meta), problem, list(self.notes))


def identities(ref: ItemRef) -> Iterator[str]:
    """An item's identity, then those it may have had in an earlier run."""
    yield ref.identity()
    if isinstance(ref, Rereadable):
        yield ref.identity_unread()


def stem_of(name: str) -> str:
    """``a/b.c.jpg`` to ``a/b.c``: what a file shares with its sidecars."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.rpartition('.')[0] or file}"


def _read_extent(stream: BinaryIO, extent: Extent) -> bytes:
    stream.seek(extent.offset)
    data = stream.read(extent.size)
    if len(data) < extent.size:
        raise OSError(f"the tar has only {len(data)} of {extent.size} bytes of {extent.name}: did it change?")
    return data
