"""Creation and commit times of an artifact, in the only file with times: all other files are equal for identical runs.

Locally ``_capipe/times.jsonl``, a line for the artifact and one for each commit. Object stores cannot append: there the
artifact's line is an object, and a commit's times are in the note beside its record (:mod:`.object_store.log`). The
last line about a shard counts. No digest covers them, and no row depends on them: without them the times are unknown.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from .files import bounded_json
from .files.storage import PRIVATE, Folder, append_line
from .object_store.log import Note

LINES = f"{PRIVATE}/times.jsonl"
CREATED = f"{PRIVATE}/times.d/artifact.json"  # in a store
_OLDER = f"{PRIVATE}/times.d/shards"  # an object for each shard, of artifacts from before the notes
_LONGEST = 1 << 16  # bytes of a line


@dataclass(frozen=True)
class Times:
    """``created``: ISO 8601 in UTC, empty if unknown. ``seconds``: by shard, from first row to commit."""

    created: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


def note_created(folder: Folder) -> None:
    line = json.dumps({"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, sort_keys=True).encode()
    if folder.is_local:
        append_line(folder.to_write(LINES), line)
    else:
        folder.write(CREATED, line)


def note_shard(folder: Folder, shard: str, started: float) -> None:
    """Record the times of a shard that is committed right afterwards in a local folder; ``started`` in epoch seconds,
    as the end."""
    ended = time.time()
    spent = round(ended - started, 3)
    entry = {"shard": shard, "started": started, "ended": ended, "seconds": spent}
    append_line(folder.to_write(LINES), json.dumps(entry, sort_keys=True).encode())


def read(folder: Folder, notes: Mapping[str, Note] | None = None) -> Times:
    """All recorded times; ``notes``: of a store's commits, by shard. Unreadable lines are skipped: nothing depends on
    them."""
    created, seconds = "", {}
    for line in _lines(folder) if folder.is_local else _objects(folder):
        try:
            entry = bounded_json.parse(line)
            if "shard" in entry:
                seconds[str(entry["shard"])] = float(entry["seconds"])
            else:
                created = str(entry["created"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    seconds |= {shard: note.seconds for shard, note in (notes or {}).items() if note.attempt}
    return Times(created, seconds)


def created(folder: Folder) -> str:
    """When the artifact was created, ISO 8601 in UTC; "" if unknown. Reads no more than it has to."""
    for name in (LINES,) if folder.is_local else (CREATED, LINES):
        try:
            with folder.open(name) as file:
                entry = bounded_json.parse(file.readline(_LONGEST))
            return str(entry["created"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return ""


def _lines(folder: Folder) -> list[bytes]:
    return folder.read_bytes(LINES).split(b"\n")[:-1] if folder.exists(LINES) else []


def _objects(folder: Folder) -> list[bytes]:
    """Lines of a store's folder; ``LINES`` is there if it was copied from a local one."""
    names = [LINES, CREATED, *(f"{_OLDER}/{name}" for name in folder.marks(_OLDER))]
    read = folder.fs.read_all(map(folder.full, names))
    return [line for data in read.values() for line in data.splitlines()]
