"""Access to single cells of a Parquet column, with only a few rows in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ...manifests.files.storage import open_parquet

_READ = 16  # rows per batch: they may hold images


class ParquetCells:
    """Forward reader of a column's cells: a worker reads rows in order. Raises OSError."""

    def __init__(self, table: str, column: str) -> None:
        self._file = open_parquet(table)
        self._column = column
        self._group = -1
        self._rows: Iterator[Any] = iter(())
        self._next = 0

    def value(self, group: int, place: int) -> object:
        """The cell at position ``place`` of a row group. Raises OSError if the file has no such row, or is damaged."""
        if group != self._group or place < self._next:
            self._group, self._next, self._rows = group, 0, self._cells(group)
        try:
            while self._next <= place:
                cell = next(self._rows)
                self._next += 1
        except (StopIteration, pa.ArrowException) as error:
            self._group = -1
            raise OSError(f"row {place} of row group {group} cannot be read: did the file change? {error}") from None
        return cell

    def _cells(self, group: int) -> Iterator[Any]:
        for batch in self._file.iter_batches(_READ, row_groups=[group], columns=[self._column], use_threads=False):
            for cell in batch.column(0):
                yield cell.as_py()

    def close(self) -> None:
        self._file.close()
