"""The last step of a shard's transaction: its finished files get their names, then it is committed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import ArtifactMismatch
from . import manifest, replacing, times
from .files.storage import Folder
from .manifest import REPLACES, ShardRecord
from .object_store import commits
from .object_store.log import Entry, Note, last
from .sharing.claims import ClaimLost


def publish(
    folder: Folder,
    generation: str,
    files: Mapping[str, Path],
    record: ShardRecord,
    started: float,
    over: ShardRecord | None = None,
) -> ShardRecord:
    """Commit a shard. ``files``: its finished, synced files by name; ``started``: epoch seconds; ``over``: the
    committed version that it replaces, of which files may stay that are not among ``files``.

    Returns the record that stands: in a store another writer may have committed the shard first. Raises ClaimLost if
    the shard was taken back meanwhile.
    """
    if not folder.is_local:
        return _publish_to_store(folder, generation, files, record, started, over)
    times.note_shard(folder, record.shard, started)
    if over is not None:
        replacing.replace(folder, files, over, record)
        return record
    for name in record.files:
        folder.publish(files[name], name)
    manifest.append(folder, record)
    return record


def retract(folder: Folder, generation: str, record: ShardRecord) -> None:
    """Take a committed shard back. Raises ArtifactMismatch if another run has replaced it meanwhile."""
    if folder.is_local:
        manifest.append(folder, record.retraction())
        return
    line, before = manifest.written(record.retraction()), _entry_of(folder, record)
    standing = commits.retract(folder, record.shard, Note(generation=generation), lambda _: line, before)
    if standing.line != line:
        raise _replaced(folder, record.shard)


def _publish_to_store(
    folder: Folder,
    generation: str,
    files: Mapping[str, Path],
    record: ShardRecord,
    started: float,
    over: ShardRecord | None,
) -> ShardRecord:
    uploads = {
        name: commits.Upload(path, int(record.files[name]["bytes"]), str(record.files[name]["sha256"]))
        for name, path in files.items()
    }
    ended = time.time()
    note = Note(
        generation=generation,
        started=started,
        ended=ended,
        seconds=round(ended - started, 3),
        **asdict(times.this_worker()),
    )
    if over is None:
        entry = commits.commit(folder, record.shard, uploads, note, lambda before: _line(folder, record, before))
    else:
        line, before = manifest.written(record), _entry_of(folder, over)
        for name in over.files.keys() - record.files.keys():  # first: after the commit nothing lists them any more
            folder.remove_file(name)
        entry = commits.replace_committed(folder, record.shard, uploads, note, line, before)
    standing = manifest.of_entry(folder, entry)
    if standing.fingerprint != record.fingerprint:
        text = f"{folder.url}: shard {record.shard} was committed by another configuration meanwhile"
        raise ArtifactMismatch(f"{text}; let one run write there, and start over with --fresh")
    if standing.retracted:
        raise ClaimLost(f"{folder.url}: shard {record.shard} was taken back by another run meanwhile")
    return standing


def _line(folder: Folder, record: ShardRecord, before: Entry | None) -> bytes:
    """The record's line; after a retraction it lists the versions that it replaces."""
    replaces = () if before is None else manifest.of_entry(folder, before).replaces
    stats: Mapping[str, Any] = {**record.stats, REPLACES: list(replaces)} if replaces else record.stats
    return manifest.written(replace(record, stats=stats))


def _entry_of(folder: Folder, record: ShardRecord) -> Entry:
    """The entry of a committed shard. Raises ArtifactMismatch if it is not the newest one any more."""
    entry = last(folder, record.shard)
    if entry is None or manifest.of_entry(folder, entry).files != record.files:
        raise _replaced(folder, record.shard)
    return entry


def _replaced(folder: Folder, shard: str) -> ArtifactMismatch:
    return ArtifactMismatch(f"{folder.url}: shard {shard} was replaced by another run; run the same command again")
