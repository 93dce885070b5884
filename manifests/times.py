"""Creation and commit times of an artifact, in the only file with times: all other files are equal for identical runs.

Locally ``_capipe/times.jsonl``, a line for the artifact and one for each commit. Object stores cannot append: there the
artifact's line is an object, and a commit's times are in the note beside its record (:mod:`.object_store.log`). The
last line about a shard counts. No digest covers them, and no row depends on them: without them the times are unknown.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from .files import bounded_json
from .files.storage import PRIVATE, Folder, append_line
from .object_store.log import Note

LINES = f"{PRIVATE}/times.jsonl"
CREATED = f"{PRIVATE}/times.d/artifact.json"  # in a store
_OLDER = f"{PRIVATE}/times.d/shards"  # an object for each shard, of artifacts from before the notes
_LONGEST = 1 << 16  # bytes of a line
MANY, LATE = 1 << 16, 1e12  # GPUs or cores of a worker, epoch seconds: beyond all real ones


@dataclass(frozen=True)
class Worker:
    """``worker``: random name of a process. ``gpus``: how many it sees, 0 on a CPU or in front of a server; ``cores``:
    of the machine, that it may use."""

    worker: str
    gpus: int
    cores: int


@dataclass(frozen=True)
class Span:
    """Work on a shard, from its first row to its commit, in epoch seconds."""

    by: Worker
    started: float
    ended: float


@dataclass(frozen=True)
class Times:
    """``created``: ISO 8601 in UTC, empty if unknown. ``seconds``: by shard, from first row to commit. ``spans``: all
    recorded work, shards that were done again included; those of older artifacts are not known."""

    created: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()


@cache
def this_worker() -> Worker:
    """This process: each worker sees its own GPUs alone."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = len([device for device in seen if device.strip() not in ("", "-1")])
    return Worker(uuid.uuid4().hex[:8], gpus, len(os.sched_getaffinity(0)))


def device_seconds(spans: Iterable[Span]) -> tuple[float, float]:
    """GPU-seconds, and core-seconds of workers without a GPU: for each worker, the time in which it worked on any
    shard, times its GPUs or cores. Loading a model, before a worker's first row, is not part of it."""
    by_worker: dict[Worker, list[Span]] = defaultdict(list)
    for span in spans:
        by_worker[span.by].append(span)
    on_gpus = on_cores = 0.0
    for worker, own in by_worker.items():
        seconds = _covered(own)
        on_gpus += worker.gpus * seconds
        on_cores += 0.0 if worker.gpus else worker.cores * seconds
    return on_gpus, on_cores


def _covered(spans: Iterable[Span]) -> float:
    """Length of the union of spans: a worker has several shards open at a time."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.started):
        total += max(0.0, span.ended - max(span.started, end))
        end = max(end, span.ended)
    return total


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
    entry = {"shard": shard, "started": started, "ended": ended, "seconds": spent, **asdict(this_worker())}
    append_line(folder.to_write(LINES), json.dumps(entry, sort_keys=True).encode())


def read(folder: Folder, notes: Mapping[str, Note] | None = None) -> Times:
    """All recorded times; ``notes``: of a store's commits, by shard. Unreadable lines are skipped: nothing depends on
    them."""
    created, seconds, spans = "", dict[str, float](), list[Span]()
    for line in _lines(folder) if folder.is_local else _objects(folder):
        try:
            entry = bounded_json.parse(line)
            if "shard" in entry:
                seconds[str(entry["shard"])] = float(entry["seconds"])
                spans += _span(entry)
            else:
                created = str(entry["created"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    by_note = {shard: note for shard, note in (notes or {}).items() if note.attempt}
    seconds |= {shard: note.seconds for shard, note in by_note.items()}
    for note in by_note.values():
        spans += _span(vars(note))
    return Times(created, seconds, tuple(spans))


def _span(entry: Mapping[str, Any]) -> list[Span]:
    """The work that an entry tells of; nothing if it is of an older version, or cannot be."""
    worker = entry.get("worker")
    counts: list[Any] = [entry.get("gpus"), entry.get("cores")]
    moments: list[Any] = [entry.get("started"), entry.get("ended")]
    if not (isinstance(worker, str) and worker and all(type(count) is int and 0 <= count < MANY for count in counts)):
        return []
    if not all(type(moment) in (int, float) and 0 <= moment < LATE for moment in moments):
        return []
    return [Span(Worker(worker, *counts), *moments)]


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
