"""Replacement of a committed shard by a new version in which some rows were redone.

In a local folder; a store's commits replace shards by themselves (:mod:`.object_store.commits`). One complete version
exists at any moment. The new version's files and manifest line are first written to a side folder
and synced; only then is the old version retracted, the files renamed over it and the line appended. A crash before that
leaves the old version unchanged; after a later crash, the next run finishes the replacement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..errors import ArtifactMismatch
from . import manifest
from .files import bounded_json
from .files.names import checked_name
from .files.storage import Folder, clear, scratch_name, sync, write_synced
from .files.tar import printable
from .manifest import ShardRecord

REDO = "redo"
_LINE = "line.json"  # retraction of the old version, line of the new one, files only the old one has; written last


def replace(folder: Folder, files: Mapping[str, Path], old: ShardRecord, new: ShardRecord) -> None:
    """Publish ``new``, with its finished ``files`` by name, in place of ``old``; files of both that are not among these
    stay as they are."""
    aside = folder.private_to_write(f"{REDO}/{new.shard}")
    clear(aside)
    aside.mkdir()
    for name, path in files.items():
        path.replace(aside / scratch_name(name))
    note = [asdict(old.retraction()), asdict(new), sorted(old.files.keys() - new.files.keys())]
    write_synced(aside / f"{_LINE}.new", json.dumps(note, sort_keys=True).encode())
    (aside / f"{_LINE}.new").replace(aside / _LINE)
    sync(aside)
    _carry_out(folder, aside)


def finish(folder: Folder) -> None:
    """Complete replacements that a crash interrupted, and remove incomplete ones."""
    if not folder.private(REDO).is_dir():
        return
    root = folder.private_folder(REDO)
    for aside in sorted(root.iterdir()):
        if not aside.is_symlink() and (aside / _LINE).exists():
            _carry_out(folder, aside)
        else:
            clear(aside)
    root.rmdir()


def _carry_out(folder: Folder, aside: Path) -> None:
    """Complete a replacement. May be interrupted and repeated at any point: a file missing here was already moved."""
    try:
        *lines, gone = bounded_json.load(aside / _LINE)
        old, new = (manifest.record_of(line) for line in lines)
        gone = [checked_name(name) for name in gone]
        if not old.shard == new.shard == aside.name:
            raise ValueError(f"lines of the shards {printable(old.shard)} and {printable(new.shard)}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = f"{aside / _LINE}: no note of a shard that is done again ({error})"
        raise ArtifactMismatch(f"{text}; remove {aside}, and `capipe verify` says what to do") from None
    manifest.append(folder, old)
    for name in new.files:
        if (aside / scratch_name(name)).exists():
            folder.publish(aside / scratch_name(name), name)
    for name in gone:
        folder.remove(name)
    manifest.append(folder, new)
    (aside / _LINE).unlink()
    clear(aside)
