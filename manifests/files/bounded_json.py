"""JSON that somebody else may have written, read within bounds: size, nesting, digits. One error for all: ValueError.

Python's own reader raises RecursionError for deep nesting, at a depth that hangs on who called it, and what it has let
through stops whatever walks the value later. Rows, lines and answers, of which there are many, have readers of their
own that turn both into one row's problem.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from .storage import Folder, refuse_irregular

MAX_NESTING = 100  # lists and objects in each other; what capipe writes has under 10
MAX_BYTES = 64 * 2**20  # of a document that is read whole: a configuration, a claim, a chain's state


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, in words, where it is none or nested over MAX_NESTING deep."""
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
    """The value of a JSON file of a folder, as of :func:`load`."""
    with folder.open(name) as file:
        return _whole(file)


def is_deeper(value: Any, most: int = MAX_NESTING) -> bool:
    """Whether a value of lists and dictionaries nests over ``most`` of them; no recursion."""
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
