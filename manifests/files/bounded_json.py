"""Untrusted JSON, read with limits on size, nesting and digits. All errors are ValueError.

Python's own parser raises RecursionError for deep nesting, at a depth that depends on the caller, and values that it
accepts can overflow code that walks them later. Rows, lines and answers, which are numerous, have readers of their own
that turn both into a problem of one row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from .storage import Folder, refuse_irregular

MAX_NESTING = 100  # nested lists and objects; files written by capipe have under 10
MAX_BYTES = 64 * 2**20  # of a document that is read in full: a configuration, a claim, a chain's state


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError if it is invalid or nested over :data:`MAX_NESTING` deep."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if opened > MAX_NESTING and is_deeper(value):
        raise ValueError(_TOO_DEEP)
    return value


def load(path: Path) -> Any:
    """The value of a local JSON file. Raises OSError, also for a pipe or device; ValueError also over MAX_BYTES."""
    refuse_irregular(path)
    with path.open("rb") as file:
        return _whole(file)


def load_from(folder: Folder, name: str) -> Any:
    """The value of a JSON file in a folder, like :func:`load`."""
    with folder.open(name) as file:
        return _whole(file)


def is_deeper(value: Any, most: int = MAX_NESTING) -> bool:
    """True if a value of lists and dictionaries is nested over ``most`` deep; without recursion."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _whole(file: BinaryIO) -> Any:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"over {MAX_BYTES >> 20} MiB of JSON")
    return parse(data)


_TOO_DEEP = f"nested over {MAX_NESTING} deep"
