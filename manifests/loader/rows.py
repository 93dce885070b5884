"""The selected rows of a shard, from its sidecars alone: one shard's at a time, in the order of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import ArtifactMismatch
from ..expressions.conditions import Mask
from ..expressions.parser import Expression
from ..files.storage import expecting, parquet_of
from ..joining.companion import Companion
from ..joining.packed_uids import DIGITS
from ..schema import SOURCE_UID
from ..status import Status
from .mix import CaptionSource, present, texts
from .sources import SHARDS, Source, reading

_IDENTITY = ["key", "uid"]
#: Columns of listings with what an image was before it was encoded anew: its uid, or the sha256 that begins with it.
_BEFORE = (SOURCE_UID, "original_sha256")
#: Statuses that say nothing against an image, only against a caption or a score of it.
_USABLE = [Status.OK, Status.EMPTY, Status.DEGENERATE, Status.REFUSED, Status.TRUNCATED, Status.ENGINE_ERROR]


@dataclass(frozen=True)
class Query:
    """What is read of every shard. ``places``: the sidecar of each column of ``where`` and of ``columns``.

    ``captions``: where those of each name of the mix are; ``columns``: those in a sample's scores by the name there,
    with their ``types``. ``before``: columns of the shards' own listing that have further uids of an image.
    """

    where: Expression | None
    places: Mapping[str, str]
    captions: Mapping[str, CaptionSource]
    columns: Mapping[str, str]
    types: Mapping[str, pa.DataType]
    before: Sequence[str] = ()

    @property
    def conditions(self) -> list[str]:
        """Columns of ``where``."""
        return [] if self.where is None else [column.name for column in self.where.columns]

    def needed(self, sidecar: str, counting: bool) -> list[str]:
        """Columns of a sidecar to read: for samples, or for ``counting`` them alone."""
        wanted = self.conditions if counting else [*self.conditions, *self.columns.values()]
        found = [name for name in wanted if self.places[name] == sidecar]
        found += [source.column for source in self.captions.values() if source.sidecar == sidecar]
        return list(dict.fromkeys([*self.identity(sidecar), "status", *found]))

    def identity(self, sidecar: str) -> list[str]:
        """Columns of a sidecar that say which images its rows are of."""
        return [*_IDENTITY, *(self.before if sidecar == SHARDS else ())]


@dataclass(frozen=True)
class RowCounts:
    """Rows by what becomes of them; each row counts once, by the first that applies.

    ``left_out``: no usable image, or left out by marks, a selection or a withdrawal; ``filtered``: `where` is not true;
    ``without_caption``: none of the captions of the mix; ``selected``: the others.
    """

    rows: int = 0
    left_out: int = 0
    filtered: int = 0
    without_caption: int = 0
    selected: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def caption_column(name: str) -> str:
    """Column of :func:`selected_rows` with the captions of a name."""
    return f"caption {name}"


def score_column(name: str) -> str:
    """Column of :func:`selected_rows` with a sample's score."""
    return f"score {name}"


def selected_rows(source: Source, query: Query) -> tuple[pa.Table, RowCounts]:
    """``key``, ``uid``, captions and scores of a shard's selected rows, in order; and the counts of all its rows.

    Raises ArtifactMismatch, with the file, if the sidecars are not of the same images or not the committed ones.
    """
    tables = {sidecar.name: _read(sidecar, query.needed(sidecar.name, False)) for sidecar in source.sidecars}
    captions, mask, counts = _selected(source, query, tables)
    first = tables[source.listing.name]
    columns = {name: first.column(name) for name in _IDENTITY}
    columns |= {caption_column(name): texts for name, texts in captions.items()}
    columns |= {score_column(name): tables[query.places[column]][column] for name, column in query.columns.items()}
    return pa.table(columns).filter(pa.array(mask)), counts


def count_rows(source: Source, query: Query) -> RowCounts:
    """The counts of :func:`selected_rows`, from the columns that decide; checksums are not compared."""
    if source.sound_rows is not None and query.where is None and _is_certain(query):
        return RowCounts(rows=source.sound_rows, selected=source.sound_rows)
    tables = {}
    for sidecar in source.sidecars:
        with reading(sidecar), sidecar.open() as parquet:
            tables[sidecar.name] = sidecar.table(parquet, query.needed(sidecar.name, True))
    return _selected(source, query, tables)[2]


def _is_certain(query: Query) -> bool:
    """True if every ok row has a caption of the mix: in captions of `annotate`, a row is ok only if all of its are."""
    return any(source.prompt is not None for source in query.captions.values())


def _selected(
    source: Source, query: Query, tables: Mapping[str, pa.Table]
) -> tuple[dict[str, pa.Array], Mask, RowCounts]:
    """Captions by name, the mask of the selected rows, and the counts."""
    first = source.listing
    size = len(tables[first.name])
    usable = np.ones(size, dtype=bool)
    for sidecar in source.sidecars:
        table = tables[sidecar.name]
        _refuse_other_rows(first, tables[first.name], sidecar, table, query.before)
        wanted = [Status.OK] if sidecar.name == SHARDS else _USABLE
        usable &= _mask(pc.is_in(table.column("status"), value_set=pa.array([str(each) for each in wanted])))
    usable &= _mask(tables[first.name].column("uid").is_valid())
    captions = {name: texts(at, tables[at.sidecar].column(at.column)) for name, at in query.captions.items()}
    kept = usable.copy()
    if query.where is not None:
        kept &= query.where.mask(pa.table({name: tables[query.places[name]][name] for name in query.conditions}))
    selected = kept & present(list(captions.values()))
    counts = RowCounts(
        rows=size,
        left_out=size - int(usable.sum()),
        filtered=int(usable.sum() - kept.sum()),
        without_caption=int(kept.sum() - selected.sum()),
        selected=int(selected.sum()),
    )
    return captions, selected, counts


def _mask(column: pa.ChunkedArray) -> Mask:
    mask: Mask = np.asarray(column.to_numpy(), dtype=bool)
    return mask


def _read(sidecar: Companion, columns: list[str]) -> pa.Table:
    """Columns of a sidecar whose bytes are the committed ones."""
    data = sidecar.read()
    with reading(sidecar), expecting(parquet_of(data), sidecar.rows, sidecar.url) as parquet:
        return sidecar.table(parquet, columns)


def uids_before(listing: pa.Schema) -> list[str]:
    """Columns of the shards' listing in which images that were encoded anew have their earlier uids."""
    return [name for name in _BEFORE if name in listing.names]


def refuse_other_images(source: Source, query: Query) -> None:
    """Raise ArtifactMismatch unless all sidecars of a shard are of the same images; no checksum is compared."""
    tables = {}
    for sidecar in source.sidecars:
        with reading(sidecar), sidecar.open() as parquet:
            tables[sidecar.name] = sidecar.table(parquet, query.identity(sidecar.name))
    first = source.listing
    for sidecar in source.sidecars:
        _refuse_other_rows(first, tables[first.name], sidecar, tables[sidecar.name], query.before)


def _refuse_other_rows(
    first: Companion, ours: pa.Table, other: Companion, theirs: pa.Table, before: Sequence[str]
) -> None:
    """Raise ArtifactMismatch unless two sidecars are of the same images, by key and uid.

    ``before``: columns of ``ours`` with further uids of an image: what was made of it before it was encoded anew is of
    the same picture.
    """
    where = f"{len(theirs):,} rows, and {len(ours):,} there"
    if len(ours) == len(theirs):
        if all(ours.column(name).equals(theirs.column(name)) for name in _IDENTITY):
            return
        same = _is_same(ours.column("key"), theirs.column("key"))
        uid = theirs.column("uid")
        known = _is_same(ours.column("uid"), uid)
        for name in before:
            known |= _mask(pc.fill_null(pc.equal(pc.utf8_slice_codeunits(ours.column(name), 0, DIGITS), uid), False))
        differs = np.flatnonzero(~(same & known))
        if not len(differs):
            return
        row = int(differs[0])
        there, here = (table.column("key")[row].as_py() for table in (theirs, ours))
        where = f"row {row}, {there!r}, is another image than {here!r} there"
    text = f"{other.url}: its rows are not those of {first.url}, by key and uid ({where})"
    raise ArtifactMismatch(f"{text}; it was not made of these shards: give what was")


def _is_same(ours: pa.ChunkedArray, theirs: pa.ChunkedArray) -> Mask:
    """Mask of the rows with equal values, or with none on both sides."""
    equal = pc.fill_null(pc.equal(ours, theirs), False)
    return _mask(pc.or_(equal, pc.and_(pc.is_null(ours), pc.is_null(theirs))))
