"""A committed shard that another version takes the place of, some of its rows having been done again.

At every moment one of the two is whole. The new version's files and its manifest line are put aside first, synced; only
then is the old one retracted, the files renamed over it and the line appended. What a crash interrupts before that
leaves the old version as it was; what it interrupts after that the next run finishes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..errors import ArtifactMismatch
from . import manifest
from .files import bounded_json
from .files.storage import Folder, clear, scratch_name, sync, write_synced
from .files.tar import printable
from .manifest import ShardRecord

REDO = "redo"
_LINE = "line.json"  # of the new version, with the retraction of the old one; written last


def replace(folder: Folder, scratch: Path, old: ShardRecord, new: ShardRecord) -> None:
    """Publish ``new``, whose files lie finished in ``scratch``, in the place of ``old``."""
    aside = folder.private_to_write(f"{REDO}/{new.shard}")
    clear(aside)
    aside.mkdir()
    for name in map(scratch_name, new.files):
        (scratch / name).replace(aside / name)
    lines = [asdict(old.retraction()), asdict(new)]
    write_synced(aside / f"{_LINE}.new", json.dumps(lines, sort_keys=True).encode())
    (aside / f"{_LINE}.new").replace(aside / _LINE)
    sync(aside)
    _carry_out(folder, aside)


def finish(folder: Folder) -> None:
    """Carry out what a crash interrupted, and drop what it left unfinished."""
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
    """May be interrupted and begun again at any point: a file that is not here any more is in its place."""
    try:
        old, new = (manifest.record_of(line) for line in bounded_json.load(aside / _LINE))
        if not old.shard == new.shard == aside.name:
            raise ValueError(f"lines of the shards {printable(old.shard)} and {printable(new.shard)}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = f"{aside / _LINE}: no note of a shard that is done again ({error})"
        raise ArtifactMismatch(f"{text}; remove {aside}, and `capipe verify` says what to do") from None
    manifest.append(folder, old)
    for name in new.files:
        if (aside / scratch_name(name)).exists():
            folder.publish(aside / scratch_name(name), name)
    manifest.append(folder, new)
    (aside / _LINE).unlink()
    clear(aside)
