"""Transaction for one shard: everything is written and synced under scratch names, renamed, then added to the manifest.

If several workers may have the same shard, the steps from the first rename to the manifest line run under a lock, after
a check of the claim (:mod:`.sharing.claims`). Crashes: before the renames nothing of the shard is visible; between
them, or before the manifest line, files without a line remain, which readers ignore and which are replaced when the
shard is redone. A shard that replaces a committed one uses :mod:`.replacing`. In a store: :mod:`.object_store.commits`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import RunFailed
from . import manifest
from .files.locks import UNLIMITED, Patience
from .files.names import checked_name
from .files.redaction import redacted_row
from .files.storage import Folder, clear, create, scratch_name, write_synced
from .files.tar import TarWriter
from .manifest import ShardRecord
from .publishing import publish
from .sharing.claims import Claim, holding, scratch_of
from .status import Status

ROW_GROUP = 1000


class ShardTransaction:
    """Context manager: ``write`` rows in input order, ``commit`` once; leaving without a commit removes every trace."""

    def __init__(
        self,
        folder: Folder,
        fingerprint: str,
        shard: str,
        schema: pa.Schema,
        tar: bool,
        claim: Claim | None = None,
        replaces: Sequence[str] = (),
        over: ShardRecord | None = None,
        generation: str = "",
    ) -> None:
        self.shard, self._folder, self._fingerprint, self._schema = shard, folder, fingerprint, schema
        self._claim, self._scratch = claim, new_scratch(folder, scratch_of(claim), shard)
        self._replaces, self._over, self._generation = replaces, over, generation
        self._counts: Counter[str] = Counter()
        self._keys: set[str] = set()
        self._rows: list[Mapping[str, Any]] = []
        self._started = time.time()
        self._files: dict[str, dict[str, Any]] = {}
        self._tar_file: BinaryIO | None = create(self._path("tar")) if tar else None
        self._tar = TarWriter(self._tar_file) if self._tar_file else None
        self._parquet_file = HashedFile(self._path("parquet"))
        self._parquet = pq.ParquetWriter(self._parquet_file, schema, compression="zstd")

    @property
    def scratch(self) -> Path:
        """A local folder that is there until the end of the transaction."""
        return self._scratch

    def _path(self, extension: str) -> Path:
        return self._scratch / f"{self.shard}.{extension}"

    def write(self, row: Mapping[str, Any], members: Mapping[str, bytes] | None = None) -> None:
        """Add a row; ``members`` (extension to bytes) adds its sample to the tar under ``<key>.<extension>``."""
        key = row["key"]
        if key in self._keys:
            raise ValueError(f"shard {self.shard}: two rows have the key {key!r}")
        self._keys.add(key)
        self._counts[Status(row["status"])] += 1
        self._rows.append(redacted_row(row))
        if len(self._rows) >= ROW_GROUP:
            self._flush()
        for extension, data in (members or {}).items():
            if self._tar is None:
                raise ValueError(f"shard {self.shard}: members given, but this stage writes no tar")
            self._tar.add(f"{key}.{extension}", data)

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows.clear()

    def commit(
        self,
        *,
        rows_in: int,
        input_info: Mapping[str, Any],
        started: float | None = None,
        stats: Mapping[str, Any] | None = None,
        beside: Mapping[str, bytes] | None = None,
        patience: Patience = UNLIMITED,
    ) -> ShardRecord:
        """Publish the shard. ``rows_in`` rows must have been written: conservation of rows is asserted here.

        ``input_info`` needs a ``digest``; ``started`` (epoch seconds) overrides the start time; ``stats`` go into the
        manifest; ``beside``: more files of the shard, by name; ``patience``: with another process that commits.
        Returns the record that stands, in a store perhaps another writer's. Publishes nothing and raises ClaimLost if
        the shard now belongs to another worker, or LockHeld if the patience ends.
        """
        if sum(self._counts.values()) != rows_in:
            text = f"shard {self.shard}: {rows_in} rows in, {sum(self._counts.values())} rows out"
            raise RunFailed(f"{text}; this is a bug in capipe, and nothing was committed")
        self._started = started or self._started
        self._finish_files()
        for name, data in (beside or {}).items():
            self._add_file(name, data)
        with holding(self._folder, self._claim, patience):
            return self._publish(input_info, stats)

    def _publish(self, input_info: Mapping[str, Any], stats: Mapping[str, Any] | None) -> ShardRecord:
        if self._replaces:
            stats = {**(stats or {}), manifest.REPLACES: list(self._replaces)}
        record = ShardRecord(
            shard=self.shard,
            rows=dict(sorted(self._counts.items())),
            files=self._files,
            input=dict(input_info),
            fingerprint=self._fingerprint,
            stats=dict(stats or {}),
        )
        files = {name: self._scratch / scratch_name(name) for name in self._files}
        return publish(self._folder, self._generation, files, record, self._started, self._over)

    def _finish_files(self) -> None:
        if self._tar is not None and self._tar_file is not None:
            digest = self._tar.finish()
            _sync(self._tar_file)
            self._files[f"{self.shard}.tar"] = {"bytes": self._tar.size, "sha256": digest}
        self._flush()
        self._parquet.close()
        self._files[f"{self.shard}.parquet"] = self._parquet_file.finish()
        self._add_file(f"{self.shard}_stats.json", shard_stats(self._counts))

    def _add_file(self, name: str, data: bytes) -> None:
        self._files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_synced(self._scratch / scratch_name(name), data)

    def __enter__(self) -> ShardTransaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close open files and remove what was not published."""
        try:
            for close in (self._close_tar, self._close_parquet, self._parquet_file.abandon):
                try:
                    close()
                except OSError:
                    if error is None:  # on a full disk closing fails again; the first error is the one to report
                        raise
        finally:
            clear(self._scratch if self._claim is None else self._scratch.parent)

    def _close_tar(self) -> None:
        if self._tar_file is not None:
            self._tar_file.close()

    def _close_parquet(self) -> None:
        if self._parquet.is_open:
            self._parquet.close()


def shard_stats(counts: Mapping[str, int]) -> bytes:
    """The ``_stats.json`` of a shard with these row counts by status: the counts that img2dataset's tools read, under
    their names. Times are in a separate file."""
    count, good = sum(counts.values()), counts.get(Status.OK, 0)
    status_dict = {("success" if status == Status.OK else str(status)): n for status, n in counts.items()}
    unread = sum(counts.get(status, 0) for status in (Status.CORRUPT, Status.MISSING, Status.READ_ERROR))
    stats = {
        "count": count,
        "successes": good,
        "failed_to_download": unread,
        "failed_to_resize": count - good - unread,
        "status_dict": dict(sorted(status_dict.items())),
    }
    return json.dumps(stats, indent=1).encode()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def new_scratch(folder: Folder, place: str, shard: str) -> Path:
    """A new folder in the private folder ``place`` for writing a shard, with an unpredictable name; leftovers of an
    earlier attempt at the shard are removed. Raises ValueError if the shard's name is invalid."""
    scratch = folder.private_folder(place)
    earlier = re.compile(re.escape(checked_name(shard)) + r"\.[0-9a-f]{16}")
    for leftover in list(scratch.iterdir()):
        if earlier.fullmatch(leftover.name):
            clear(leftover)
    path = scratch / f"{shard}.{uuid.uuid4().hex[:16]}"
    path.mkdir()
    return path


class HashedFile:
    """A new local file, written sequentially (as pyarrow writes Parquet) and hashed while writing."""

    def __init__(self, path: Path) -> None:
        self._file = create(path)
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Ignored: pyarrow closes its sink, but the file is still to be synced."""

    @property
    def closed(self) -> bool:
        return self._file.closed

    def finish(self) -> dict[str, Any]:
        _sync(self._file)
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        self._file.close()
