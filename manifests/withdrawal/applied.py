"""The list of withdrawn images that an artifact was made with: it is kept, it may grow, and it never shrinks.

It is no part of the fingerprint: opt-outs come after release, and a longer list must not cost the rows of other images.
``_capipe/withdrawn.npy`` has the uids, sorted, 16 bytes each. A longer list replaces it before the first shard is
rewritten; then the shards with a newly listed uid are found by their uids and rewritten, each in one transaction. The
configuration notes when all are done; until then the same command finds those that a crash left.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import ArtifactMismatch, BadInput
from ..artifact import Artifact
from ..files.storage import PRIVATE, Folder
from ..manifest import ShardRecord
from ..schema import SOURCE_UID
from ..status import Status
from .uid_set import EMPTY, UidSet

FILE = f"{PRIVATE}/withdrawn.npy"
NOTE = "withdrawn"  # key of a configuration's facts about the run: {"uids": number, "sha256": …, "checked": bool}


def applied(artifact: Artifact) -> UidSet:
    """The uids that are withdrawn in an artifact, as its configuration notes them; none for most. Cached.

    Raises ArtifactMismatch if its list is missing or another one.
    """
    note = artifact.config["run"].get(NOTE)
    if note is None:
        return EMPTY
    if not isinstance(note, dict) or not isinstance(note.get("sha256"), str):
        raise ArtifactMismatch(f"{artifact.url}: its configuration has no sound note of withdrawn uids; restore it")
    return _read(artifact.url, note["sha256"])


def has_withdrawn(artifact: Artifact) -> bool:
    """True if rows of an artifact are withdrawn: by a list of its own, or since they are in its input."""
    return NOTE in artifact.config["run"] or any(
        record.rows.get(Status.WITHDRAWN) for record in artifact.committed().values()
    )


@lru_cache(maxsize=8)
def _read(url: str, sha256: str) -> UidSet:
    uids = _stored(Folder(url))
    if uids is None or uids.sha256 != sha256:
        how = "missing" if uids is None else "not the one that its configuration notes"
        raise ArtifactMismatch(f"{url}/{FILE}: {how}; restore it, or give the same --drop again")
    return uids


def _stored(folder: Folder) -> UidSet | None:
    if not folder.exists(FILE):
        return None
    try:
        packed = np.load(io.BytesIO(folder.read_bytes(FILE)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArtifactMismatch(f"{folder.url}/{FILE}: not a list of uids ({error}); restore it") from None
    if packed.dtype != np.dtype("S16") or packed.ndim != 1 or not (packed[:-1] < packed[1:]).all():
        raise ArtifactMismatch(f"{folder.url}/{FILE}: not a sorted list of uids; restore it")
    return UidSet(packed, f"{folder.url}/{FILE}", len(packed))


@dataclass(frozen=True)
class Withdrawal:
    """A list applied to an artifact. ``touched``: committed shards that still have rows of its uids, by name."""

    artifact: Artifact
    uids: UidSet
    touched: dict[str, ShardRecord]

    def conclude(self) -> None:
        """Note that no committed shard is touched any more."""
        if NOTE in self.artifact.config["run"]:
            _note(self.artifact, self.uids, checked=True)

    def line(self) -> str | None:
        """What the list withdrew, for users; None without a list."""
        if not self.uids.source:
            return None
        if self.artifact.config["run"][NOTE]["checked"] is not True:
            text = "shards with its images are left; fix what is said about them, and run the same command again"
            return f"{self.uids.source}: not all of it is withdrawn: {text}"
        rows, found = matched(self.artifact, self.uids)
        unknown = len(self.uids) - found
        text = f"withdrawn: {rows:,} rows, by {found:,} of the {len(self.uids):,} uids in {self.uids.source}"
        return f"{text}; {unknown:,} are of no image here" if unknown else text


def apply(artifact: Artifact, given: UidSet | None) -> Withdrawal:
    """Make ``given`` the list of a locked artifact, and find the committed shards to rewrite. Raises BadInput.

    A list that lacks a uid of the artifact's own is refused: withdrawn images would come back, or be gone for good
    without a record of why. So is a run without any list.
    """
    own = _stored(artifact.folder)
    if own is not None and given is None:
        text = f"{artifact.url}: made with --drop, of {len(own):,} uids; give that list, or a longer one"
        raise BadInput(f"{text}, or --fresh to start over")
    if given is None:
        return Withdrawal(artifact, EMPTY, {})
    if own is not None and len(missing := own.missing_in(given)):
        text = f"{given.source}: lacks {len(missing):,} of the {len(own):,} uids that {artifact.url} was made with"
        raise BadInput(f"{text} ({missing.shown()[0]}, …); add them, or use --fresh to start over")
    note = artifact.config["run"].get(NOTE)
    if own is not None and isinstance(note, dict) and note.get("checked") is True and own.sha256 == given.sha256:
        return Withdrawal(artifact, given, {})
    another = own is not None and own.sha256 != given.sha256
    touched = {name: record for name, record in artifact.committed().items() if _is_touched(artifact, name, given)}
    if artifact.shared and (another or touched):
        text = f"{given.source}: another list than {artifact.url} was made with, whose shards others may be adding to"
        raise BadInput(f"{text}; run the command once without --share")
    _store(artifact, given)
    withdrawal = Withdrawal(artifact, given, touched)
    if not touched:
        withdrawal.conclude()
    return withdrawal


def _store(artifact: Artifact, uids: UidSet) -> None:
    data = io.BytesIO()
    np.save(data, uids.packed, allow_pickle=False)
    artifact.folder.write(FILE, data.getvalue())
    _note(artifact, uids, checked=False)


def _note(artifact: Artifact, uids: UidSet, *, checked: bool) -> None:
    note: dict[str, Any] = {"uids": len(uids), "sha256": uids.sha256, "checked": checked}
    if artifact.config["run"].get(NOTE) != note:
        artifact.note(**{NOTE: note})


def encodes_anew(artifact: Artifact) -> bool:
    """True of an export that encoded images anew: its rows have the uids of their source as well."""
    options = artifact.config["semantic"].get("export")
    return isinstance(options, dict) and options.get("transcode") is not None


def _uids(artifact: Artifact, table: pa.Table) -> Iterator[pa.ChunkedArray]:
    """The columns by which a row may be listed."""
    yield table.column("uid")
    if encodes_anew(artifact):
        yield table.column(SOURCE_UID)


def _listing(artifact: Artifact, shard: str) -> pa.Table:
    return artifact.table(shard, ["uid", "status", *([SOURCE_UID] if encodes_anew(artifact) else [])])


def _is_touched(artifact: Artifact, shard: str, uids: UidSet) -> bool:
    table = _listing(artifact, shard)
    standing = np.array(pc.not_equal(table.column("status"), str(Status.WITHDRAWN)), dtype=bool)
    return any(bool((uids.mask(column) & standing).any()) for column in _uids(artifact, table))


def matched(artifact: Artifact, uids: UidSet) -> tuple[int, int]:
    """Withdrawn rows of an artifact, and the number of distinct ``uids`` that they are of."""
    rows, found = 0, np.zeros(len(uids), dtype=bool)
    for record in artifact.committed().values():
        if record.rows.get(Status.WITHDRAWN):
            rows += record.rows[Status.WITHDRAWN]
            table = _listing(artifact, record.shard)
            gone = pc.equal(table.column("status"), str(Status.WITHDRAWN))
            for column in _uids(artifact, table):
                places = uids.places(column.filter(gone))
                found[places[places >= 0]] = True
    return rows, int(found.sum())
