"""Counts of selected rows by shard, from sidecars: equal shares for ranks need them before the first image is read.

They cost one pass over the deciding columns of all sidecars, or nothing where manifests say that every row is selected.
Kept in a file, they are counted once for all later runs on the same data by the same options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ..files import bounded_json
from ..files.allowed import split
from ..files.outside import is_url
from ..files.storage import Folder, write_new
from .rows import Query, RowCounts, count_rows
from .sources import Source

_READERS = 8  # sidecars read at a time: in stores the time goes by waiting


def count_all(sources: Sequence[Source], query: Query) -> list[RowCounts]:
    """Counts of every shard. Raises CapipeError for the first one, in order, that cannot be read."""
    with ThreadPoolExecutor(_READERS, "counts") as pool:
        try:
            return list(pool.map(partial(count_rows, query=query), sources))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def saved(place: str, settings: Mapping[str, Any]) -> list[RowCounts] | None:
    """The counts in a file, None if there is none yet. Raises BadInput if it has others than those of ``settings``."""
    folder, name = _split(place)
    if not folder.exists(name):
        return None
    try:
        found = bounded_json.load_from(folder, name)
        same = found["settings"] == settings
        counts = [RowCounts(*(_number(number) for number in row)) for row in found["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"counts={place}: not a file of counts ({error}); remove it, or name another") from None
    if not same:
        raise BadInput(f"counts={place}: of other data or options; remove the file, or name another")
    return counts


def save(place: str, settings: Mapping[str, Any], counts: Sequence[RowCounts]) -> None:
    """Write the counts in one step."""
    folder, name = _split(place)
    shards = [astuple(each) for each in counts]
    data = json.dumps({"settings": settings, "shards": shards}, sort_keys=True).encode()
    if folder.is_local:
        write_new(folder.local(name), data)
    else:
        folder.fs.write(data, folder.full(name))


def _split(place: str) -> tuple[Folder, str]:
    return split(place if is_url(place) else str(Path(place).absolute()))


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
