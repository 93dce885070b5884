"""One artifact as a table: its own columns, joined with those of all artifacts with the same images.

Columns are read on demand, a shard at a time, and cached up to a budget. A table is a snapshot of the commits at its
creation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import BadInput, CapipeError
from ...manifests.expressions.parser import Expression, parse
from ...manifests.schema import LATER
from ...manifests.sidecars import jsonable
from ..inspect.images import Cache
from ..inspect.shard_join import ShardJoin, ShardName
from ..specs import artifact_spec
from .columns import Flat, flat_columns, identifier

Rows = npt.NDArray[np.int32]
Arrays = Cache[tuple[str, str], pa.Array]
_SAME = "key|uid|error"  # columns that repeat another artifact's, in every stage
_REASON = 300  # longest reason for an invalid filter, in characters
_UNREADABLE = (OSError, ValueError, KeyError, CapipeError)


class Unknown(BadInput):
    """Something requested that does not exist (404)."""


class Unreadable(BadInput):
    """A committed shard whose Parquet cannot be read."""


@dataclass(frozen=True)
class Column:
    """A column with its name in filters. ``artifact``: the artifact it belongs to."""

    name: str
    artifact: str
    flat: Flat


class Table:
    def __init__(self, join: ShardJoin, name: str, arrays: Arrays) -> None:
        self.join, self.name, self._arrays = join, name, arrays
        self.shards = list(join.records[name])
        self.counts = {shard: record.count for shard, record in join.records[name].items()}
        self._index = {shard: number for number, shard in enumerate(self.shards)}
        self._joined: dict[str, dict[str, ShardName]] = {}
        self._fitting: dict[tuple[ShardName, ShardName], bool] = {}
        self._stamps: dict[str, str] = {}

    def _beside(self, shard: str) -> dict[str, ShardName]:
        """Shards of other artifacts with the same rows, by artifact."""
        known = self._joined.get(shard)
        if known is None:
            others = reversed(self.join.beside(ShardName(self.name, shard)))
            known = self._joined[shard] = {other.artifact: other for other in others}
        return known

    @property
    def rows(self) -> int:
        return sum(self.counts.values())

    def number(self, shard: str) -> int:
        """Index of a shard in the table. Raises Unknown."""
        if shard not in self._index:
            raise Unknown(f"no shard {shard[:80]!r} is committed here")
        return self._index[shard]

    def stamp(self, shard: str) -> str:
        """Digest of a shard's rows and the rows joined to it."""
        self.number(shard)
        if shard not in self._stamps:
            places = [ShardName(self.name, shard), *self._beside(shard).values()]
            self._stamps[shard] = _hashed([f"{part.artifact}={self._digest(part)}" for part in places])
        return self._stamps[shard]

    @cached_property
    def whole_stamp(self) -> str:
        """Digest of all shards' stamps."""
        return _hashed([self.name, *map(self.stamp, self.shards)])

    def _digest(self, shard_name: ShardName) -> str:
        return str(self.join.record(shard_name).files[f"{shard_name.shard}.parquet"]["sha256"])

    # --- columns -----------------------------------------------------------------------------------------------------

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The artifact's own columns, then those of the others, oldest artifact first.

        A name that is already taken gets its artifact's name as a prefix, so later artifacts rename nothing.
        """
        columns: dict[str, Column] = {}
        for artifact, places in self._sources().items():
            for flat in self._flats(places):
                if artifact == self.name:
                    columns.setdefault(flat.name, Column(flat.name, artifact, flat))
                elif not self._repeated(artifact, flat.name):
                    name = flat.name
                    if name in columns and artifact_spec(self.join.artifacts[artifact].stage).shown == "text":
                        continue  # the images' original text, copied on by later stages
                    if name in columns or name == "status":
                        name = f"{identifier(artifact)}_{name}"
                    columns.setdefault(name, Column(name, artifact, flat))
        return columns

    def _repeated(self, artifact: str, name: str) -> bool:
        repeated = artifact_spec(self.join.artifacts[artifact].stage).repeated
        return any(re.fullmatch(pattern, name) for pattern in (_SAME, repeated))

    def _sources(self) -> dict[str, list[ShardName]]:
        """Artifacts with rows in this table, this one first, each with a few of its shards."""
        few = dict.fromkeys((*self.shards[:2], *self.shards[-1:]))
        sources: dict[str, list[ShardName]] = {self.name: [ShardName(self.name, shard) for shard in few]}
        for shard in self.shards:
            for artifact, shard_name in self._beside(shard).items():
                if len(places := sources.setdefault(artifact, [])) < 3:
                    places.append(shard_name)
        order = {name: number for number, name in enumerate(self.join.records)}
        return dict(sorted(sources.items(), key=lambda item: (item[0] != self.name, order[item[0]])))

    def _flats(self, places: Sequence[ShardName]) -> list[Flat]:
        """Columns of the first that can be read, and of the others those that earlier versions did not write."""
        flats: dict[str, Flat] = {}
        for shard_name in places:
            try:
                with self._parquet(shard_name) as parquet:
                    found = flat_columns(parquet)
            except _UNREADABLE:
                continue
            for flat in found if not flats else [flat for flat in found if flat.name in LATER]:
                flats.setdefault(flat.name, flat)
        return list(flats.values())

    def _parquet(self, shard_name: ShardName) -> pq.ParquetFile:
        return self.join.artifacts[shard_name.artifact].parquet(shard_name.shard)

    @property
    def types(self) -> dict[str, pa.DataType]:
        return {name: column.flat.type for name, column in self.columns.items()}

    def expression(self, text: str) -> Expression:
        """Parse a filter over these columns; the prefix ``re_`` of scores is optional. Raises BadInput, in one line."""
        shared = {name.removeprefix("re_"): name for name in self.columns if name.startswith("re_")}
        aliases = {short: name for short, name in shared.items() if short not in self.columns}
        try:
            return parse(text, self.types, aliases)
        except BadInput as error:
            # Drop what precedes the reason: it repeats the text, which the input field already shows.
            reason = str(error).partition(f"{_quoted(text)}: ")[2] or str(error)
            raise BadInput(reason if len(reason) <= _REASON else reason[: _REASON - 1] + "…") from None

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, shard: str, names: Sequence[str]) -> pa.Table:
        """Columns of a shard. Raises Unreadable if its own cannot be read; unreadable columns of others become null."""
        self.number(shard)
        by_artifact: dict[str, list[Column]] = {}
        for name in dict.fromkeys(names):
            if name not in self.columns:
                raise Unknown(f"no column {name[:80]!r}")
            by_artifact.setdefault(self.columns[name].artifact, []).append(self.columns[name])
        read: dict[str, pa.Array] = {}
        for artifact, columns in by_artifact.items():
            read |= self._own(shard, columns) if artifact == self.name else self._others(shard, artifact, columns)
        return pa.table({name: read[name] for name in dict.fromkeys(names)})

    def _own(self, shard: str, columns: list[Column]) -> dict[str, pa.Array]:
        try:
            return self._made(ShardName(self.name, shard), columns)
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())[:200]
            raise Unreadable(f"{shard}.parquet cannot be read ({reason}); `capipe verify` says what is wrong") from None

    def _others(self, shard: str, artifact: str, columns: list[Column]) -> dict[str, pa.Array]:
        shard_name = self._beside(shard).get(artifact)
        try:
            if shard_name is not None and self._fits(ShardName(self.name, shard), shard_name):
                return self._made(shard_name, columns)
        except _UNREADABLE:
            pass
        return {column.name: pa.nulls(self.counts[shard], column.flat.type) for column in columns}

    def _fits(self, own: ShardName, other: ShardName) -> bool:
        """Whether the rows of both shards are of the same images, one by one."""
        known = self._fitting.get((own, other))
        if known is None:
            ours, theirs = (self._plain(shard_name, "uid") for shard_name in (own, other))
            known = self._fitting[own, other] = bool(ours.equals(theirs))
        return known

    def _plain(self, shard_name: ShardName, name: str) -> pa.Array:
        key = (self._digest(shard_name), name)
        array = self._arrays.get(key)
        if array is None:
            with self._parquet(shard_name) as parquet:
                array = _whole(parquet.read(columns=[name], use_threads=False).column(0))
            self._arrays.put(key, array)
        return array

    def _made(self, shard_name: ShardName, columns: list[Column]) -> dict[str, pa.Array]:
        """Columns of one file, from the cache or read at once."""
        digest = self._digest(shard_name)
        loaded = {column.name: self._arrays.get((digest, column.flat.name)) for column in columns}
        missing = [column for column in columns if loaded[column.name] is None]
        if missing:
            with self._parquet(shard_name) as parquet:
                leaves = list(dict.fromkeys(leaf for column in missing for leaf in column.flat.leaves))
                table = parquet.read(columns=leaves, use_threads=False)
            for column in missing:
                array = _whole(column.flat.make(table))
                if len(array) != self.join.record(shard_name).count:
                    raise BadInput(f"{len(array)} rows, {self.join.record(shard_name).count} in the manifest")
                loaded[column.name] = array
                self._arrays.put((digest, column.flat.name), array)
        return loaded

    # --- single rows -------------------------------------------------------------------------------------------------

    def row_name(self, shard: str, row: int) -> dict[str, Any]:
        """``key`` of a row; in final shards also its source shard and key. Raises Unknown."""
        self.number(shard)
        if not 0 <= row < self.counts[shard]:
            raise Unknown(f"shard {shard} has {self.counts[shard]} rows")
        names = [name for name in ("key", "source_shard", "source_key") if self._is_own(name)]
        read = self.read(shard, names)
        return {name: read[name][row].as_py() for name in names}

    def _is_own(self, name: str) -> bool:
        return name in self.columns and self.columns[name].artifact == self.name

    def whole(self, shard: str, row: int) -> dict[str, dict[str, Any]]:
        """A row with the rows joined to it, by artifact, its own first; without bytes."""
        own = ShardName(self.name, shard)
        self.row_name(shard, row)
        rows = {self.name: self._row(own, row)}
        for artifact, shard_name in self._beside(shard).items():
            try:
                if self._fits(own, shard_name):
                    rows[artifact] = self._row(shard_name, row)
            except _UNREADABLE:
                continue
        return rows

    def _row(self, shard_name: ShardName, row: int) -> dict[str, Any]:
        """Read one row; only its row group is read."""
        with self._parquet(shard_name) as parquet:
            for group in range(parquet.metadata.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                if row < count:
                    read = parquet.read_row_group(group, use_threads=False).slice(row, 1).to_pylist()[0]
                    values: dict[str, Any] = jsonable(read)  # without bytes
                    return values
                row -= count
        raise Unknown("the shard has fewer rows than its manifest says")


def _whole(column: Any) -> pa.Array:
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _hashed(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _quoted(text: str) -> str:
    """A filter's text as repeated in its errors."""
    return repr(text if len(text) <= 200 else text[:199] + "…")
