"""Rows that match a filter and a search: pages, counts, histograms, thresholds.

A request scans shards in order within a time budget. Matches are cached by shard, so the next request resumes where
this one stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import BadInput
from ...manifests.expressions.parser import kind_of, shown_value
from ..inspect.images import Cache
from .table import Rows, Table, Unreadable

BINS = 120
_BORDER = 5  # examples on each side of a threshold
BUDGET = 1.0  # seconds that a request may scan shards
_SEARCHED = ("key", "uid")

Where = tuple[str, int]  # shard and row


@dataclass(frozen=True)
class Query:
    """``filter``: a condition over columns; ``search``: substring of a caption, question, key or uid."""

    filter: str = ""
    search: str = ""

    @property
    def everything(self) -> bool:
        return not (self.filter.strip() or self.search.strip())


@dataclass(frozen=True)
class Page:
    """Rows in order. ``before`` and ``after``: start of the previous and next page, None at an end; ``stopped``: the
    time ran out before the page was full; resume at ``after`` (``before`` when going back)."""

    rows: list[Where]
    before: Where | None
    after: Where | None
    stopped: bool
    faults: list[str]


@dataclass(frozen=True)
class Spread:
    """All values of a column for a query, sorted. ``places``: shard number and row of each."""

    values: npt.NDArray[Any]
    places: npt.NDArray[np.int64]  # shard number << 32 | row
    missing: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.places.nbytes


class Finder:
    """Answers queries over tables and caches matches; thread-safe."""

    def __init__(self) -> None:
        self._matches: Cache[tuple[str, Query], Rows] = Cache(128 << 20, lambda rows: int(rows.nbytes) + 64)
        self._spreads: Cache[tuple[str, str, Query], Spread] = Cache(256 << 20, lambda spread: spread.nbytes)
        self._building = threading.Lock()

    def _rows(self, table: Table, shard: str, query: Query) -> Rows:
        """Matching rows of a shard. Raises Unreadable, and BadInput for an invalid filter."""
        if query.everything:
            return np.arange(table.counts[shard], dtype=np.int32)
        key = (table.stamp(shard), query)
        known = self._matches.get(key)
        if known is None:
            known = np.flatnonzero(_mask(table, shard, query)).astype(np.int32)
            self._matches.put(key, known)
        return known

    # --- pages -------------------------------------------------------------------------------------------------------

    def page(
        self, table: Table, query: Query, start: Where | None, limit: int, back: bool = False, budget: float = BUDGET
    ) -> Page:
        """Rows from ``start`` on (inclusive), or the rows before it. Raises BadInput."""
        check(table, query)
        end = time.monotonic() + budget
        number = (len(table.shards) - 1 if back else 0) if start is None else table.number(start[0])
        step = -1 if back else 1
        taken: list[Where] = []
        faults: list[str] = []
        stopped = False
        while 0 <= number < len(table.shards) and len(taken) <= limit:
            shard = table.shards[number]
            try:
                rows = self._rows(table, shard, query)
            except Unreadable as error:
                faults.append(str(error))
                rows = np.empty(0, np.int32)
            if start is not None and shard == start[0]:
                rows = rows[rows < start[1]] if back else rows[rows >= start[1]]
            need = limit + 1 - len(taken)
            taken += [(shard, int(row)) for row in (rows[::-1] if back else rows)[:need]]
            number += step
            if time.monotonic() > end and len(taken) <= limit and 0 <= number < len(table.shards):
                stopped = True
                break
        beyond = taken[limit] if len(taken) > limit else None
        shown = taken[:limit]
        if stopped:
            shard = table.shards[number]
            beyond = (shard, table.counts[shard] if back else 0)
        if back:
            shown.reverse()
            # ``before`` is exclusive: the page that ends before the first row shown.
            return Page(
                shown, (shown[0] if shown and not stopped else beyond) if beyond else None, start, stopped, faults
            )
        return Page(shown, start if start and start != _first(table) else None, beyond, stopped, faults)

    def count(self, table: Table, query: Query, budget: float = BUDGET) -> dict[str, Any]:
        """Matching rows among those scanned within the budget. Raises BadInput."""
        check(table, query)
        end = time.monotonic() + budget
        matched = scanned = 0
        faults: list[str] = []
        done = True
        for shard in table.shards:
            try:
                matched += len(self._rows(table, shard, query))
            except Unreadable as error:
                faults.append(str(error))
            scanned += table.counts[shard]
            if time.monotonic() > end and shard != table.shards[-1]:
                done = False
                break
        return {"matched": matched, "scanned": scanned, "total": table.rows, "done": done, "faults": faults}

    # --- scores ------------------------------------------------------------------------------------------------------

    def spread(self, table: Table, column: str, query: Query, budget: float = BUDGET) -> tuple[Spread, int, bool]:
        """Values of a column, number of rows scanned, and whether these are all."""
        check(table, query)
        if column not in table.columns or kind_of(table.columns[column].flat.type) != "number":
            raise BadInput(f"{column[:80]!r} is no column of numbers")
        key = (table.whole_stamp, column, query)
        known = self._spreads.get(key)
        if known is not None:
            return known, table.rows, True
        with self._building:  # two threads sorting the same millions of values would only be slower
            known = self._spreads.get(key)
            if known is None:
                known, seen, done = self._gathered(table, column, query, budget)
                if not done:
                    return known, seen, False
                self._spreads.put(key, known)
        return known, table.rows, True

    def _gathered(self, table: Table, column: str, query: Query, budget: float) -> tuple[Spread, int, bool]:
        end = time.monotonic() + budget
        values: list[npt.NDArray[Any]] = []
        places: list[npt.NDArray[np.int64]] = []
        seen = rows_seen = 0
        done = True
        for number, shard in enumerate(table.shards):
            try:
                rows = self._rows(table, shard, query)
                array = table.read(shard, [column]).column(0).combine_chunks()
            except Unreadable:
                continue
            finally:
                seen += table.counts[shard]
            if pa.types.is_integer(array.type):
                array = array.cast(pa.float64())
            all_values = np.asarray(array.to_numpy(zero_copy_only=False))[rows]
            rows_seen += len(rows)
            sound = np.isfinite(all_values)
            values.append(all_values[sound])
            places.append((np.int64(number) << 32) | rows[sound].astype(np.int64))
            if time.monotonic() > end and number + 1 < len(table.shards):
                done = False
                break
        whole = np.concatenate(values) if values else np.empty(0)
        order = np.argsort(whole, kind="stable")
        where = np.concatenate(places) if places else np.empty(0, np.int64)
        return Spread(whole[order], where[order], rows_seen - len(whole)), seen, done

    def histogram(self, table: Table, column: str, query: Query) -> dict[str, Any]:
        """Histogram of a column over the whole range of the rows scanned."""
        spread, seen, done = self.spread(table, column, query)
        values = spread.values
        low, high = (float(values[0]), float(values[-1])) if len(values) else (0.0, 1.0)
        edges = np.linspace(low, high, BINS + 1) if low < high else np.linspace(low - 0.5, high + 0.5, BINS + 1)
        counts = np.histogram(values, edges)[0]
        return {
            "column": column,
            "edges": [float(edge) for edge in edges],
            "counts": counts.tolist(),
            "values": len(values),
            "missing": spread.missing,
            "scanned": seen,
            "total": table.rows,
            "done": done,
        }

    def threshold(self, table: Table, column: str, query: Query, value: float, at_least: bool) -> dict[str, Any]:
        """Exact number of rows kept at a threshold, and the nearest rows on both sides.

        The value is rounded to the column's precision, as in `capipe filter --keep`.
        """
        spread, seen, done = self.spread(table, column, query)
        single = spread.values.dtype == np.float32
        held = np.float32(value) if single else np.float64(value)
        at = int(np.searchsorted(spread.values, held, "left" if at_least else "right"))
        total = len(spread.values)
        below = [_where(table, spread, index) for index in range(at - 1, max(-1, at - 1 - _BORDER), -1)]
        above = [_where(table, spread, index) for index in range(at, min(total, at + _BORDER))]
        sign = ">=" if at_least else "<="
        return {
            "kept": total - at if at_least else at,
            "values": total,
            "missing": spread.missing,
            "rows": total + spread.missing,
            "scanned": seen,
            "total": table.rows,
            "done": done,
            "keep": f"{column} {sign} {shown_value(float(held)) if single else f'{value:.10g}'}",
            "stay": above if at_least else below,
            "go": below if at_least else above,
        }


def _first(table: Table) -> Where | None:
    return (table.shards[0], 0) if table.shards else None


def _where(table: Table, spread: Spread, index: int) -> dict[str, Any]:
    packed = int(spread.places[index])
    return {"shard": table.shards[packed >> 32], "row": packed & 0xFFFFFFFF, "value": float(spread.values[index])}


def check(table: Table, query: Query) -> None:
    """Raise BadInput for an invalid filter, even if the table has no shards."""
    if query.filter.strip():
        table.expression(query.filter)


def _mask(table: Table, shard: str, query: Query) -> npt.NDArray[np.bool_]:
    mask = np.ones(table.counts[shard], bool)
    if query.filter.strip():
        expression = table.expression(query.filter)
        mask &= expression.mask(table.read(shard, [column.name for column in expression.columns]))
    if query.search.strip() and mask.any():
        mask &= _found(table, shard, query.search.strip())
    return mask


def _found(table: Table, shard: str, text: str) -> npt.NDArray[np.bool_]:
    matches = np.zeros(table.counts[shard], bool)
    for array in _texts(table, shard):
        hit = pc.match_substring(array, text, ignore_case=True)
        matches |= np.asarray(pc.fill_null(hit, False).to_numpy(zero_copy_only=False), bool)
    return matches


def _texts(table: Table, shard: str) -> Iterator[pa.Array]:
    names = [name for name, column in table.columns.items() if column.flat.prose or name in _SEARCHED]
    read = table.read(shard, names)
    return (read[name].combine_chunks() for name in names)
