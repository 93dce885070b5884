"""The rule of marks: which rows are left out, and with what status. Selection and stages with models share it.

Marks are an artifact with a row for every row of the shards: those of `capipe dedup`, a selection of `capipe filter`,
or any other. A row that is not ok there is left out with the status and the reason that it has there. A row that is not
ok by itself keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ...manifests.expressions.conditions import Mask
from ...manifests.shards import Row
from ...manifests.status import Status

MARKS = "marks"  # name of the marks in a row's ``beside``
#: Statuses that rows have by marks alone, not by a fault of their image or of a model.
LEFT_OUT = frozenset({Status.DUPLICATE, Status.CONTAMINATED, Status.UNSAFE, Status.FILTERED, Status.WITHDRAWN})


def is_left_out(mark: str) -> bool:
    """True if a row with this status in the marks is left out."""
    return mark != Status.OK


def standing(marks: Sequence[str]) -> Mask:
    """Mask of the rows that marks of these statuses do not leave out."""
    return np.fromiter((not is_left_out(mark) for mark in marks), bool, len(marks))


def marked_status(status: str, error: str | None, mark: Mapping[str, Any] | None) -> tuple[str, str | None]:
    """Status and error of a row from its own and its row in the marks, if there are any."""
    if status == Status.OK and mark is not None and is_left_out(mark["status"]):
        return mark["status"], mark["error"]
    return status, error


def unaffected(rows: Mapping[int, dict[str, Any]], sidecars: Sequence[Sequence[str]]) -> dict[int, dict[str, Any]]:
    """Of a stage's ``rows``, by index, those that other statuses in its sidecars than before cannot have changed.

    These are the ok rows of images that none of them leaves out now. A row that is not ok may have been left out.
    """
    ok = {index: row for index, row in rows.items() if row["status"] == Status.OK}
    return {index: row for index, row in ok.items() if not any(each[index] in LEFT_OUT for each in sidecars)}


class Rows(Protocol):
    """Reader of a shard's rows; ``info`` is its input entry for a manifest, complete after the iteration."""

    @property
    def info(self) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[Row]: ...


class MarkedReader:
    """A reader whose marked rows have their status and no image: they are neither decoded nor shown to a model."""

    def __init__(self, reader: Rows) -> None:
        self._reader = reader

    @property
    def info(self) -> dict[str, Any]:
        """As :attr:`Rows.info`."""
        return self._reader.info

    def __iter__(self) -> Iterator[Row]:
        for row in self._reader:
            status, error = marked_status(row.status, row.error, row.beside.get(MARKS))
            yield row if status == row.status else replace(row, status=Status(status), error=error, image=None)
