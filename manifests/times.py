"""Creation and commit times of an artifact, in the only file with times: all other files are equal for identical runs.

Locally ``_capipe/times.jsonl``, a line for the artifact and one for each commit; object stores cannot append, so there
each line is an object of its own in ``_capipe/times.d/``. The last line about a shard counts. No digest covers it, and
no row depends on it: without it the times are unknown.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .files import bounded_json
from .files.storage import PRIVATE, Folder, append_line

LINES = f"{PRIVATE}/times.jsonl"
OBJECTS = f"{PRIVATE}/times.d"


@dataclass(frozen=True)
class Times:
    """``created``: ISO 8601 in UTC, empty if unknown. ``seconds``: by shard, from first row to commit."""

    created: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


def note_created(folder: Folder) -> None:
    _append(folder, "artifact", {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})


def note_shard(folder: Folder, shard: str, started: float) -> None:
    """Record the times of a shard that is committed right afterwards; ``started`` in epoch seconds, as the end."""
    ended = time.time()
    spent = round(ended - started, 3)
    _append(folder, f"shards/{shard}", {"shard": shard, "started": started, "ended": ended, "seconds": spent})


def read(folder: Folder) -> Times:
    """All recorded times. Unreadable lines are skipped: nothing depends on them."""
    created, seconds = "", {}
    for line in _lines(folder):
        try:
            entry = bounded_json.parse(line)
            if "shard" in entry:
                seconds[str(entry["shard"])] = float(entry["seconds"])
            else:
                created = str(entry["created"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return Times(created, seconds)


def _append(folder: Folder, name: str, entry: Mapping[str, Any]) -> None:
    line = json.dumps(entry, sort_keys=True).encode()
    if folder.is_local:
        append_line(folder.to_write(LINES), line)
    else:
        folder.write(f"{OBJECTS}/{name}.json", line)


def _lines(folder: Folder) -> list[bytes]:
    if folder.is_local:
        return folder.read_bytes(LINES).split(b"\n")[:-1] if folder.exists(LINES) else []
    names = ["artifact.json", *(f"shards/{name}" for name in folder.names(f"{OBJECTS}/shards"))]
    return [folder.read_bytes(f"{OBJECTS}/{name}") for name in names if folder.exists(f"{OBJECTS}/{name}")]
