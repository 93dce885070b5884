"""State of a shard in a worker: reader, finished rows, commit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...manifests.files.locks import UNLIMITED, Patience
from ...manifests.files.store_errors import StoreUnavailable
from ...manifests.manifest import ShardRecord
from ...manifests.schema import ASKED, TOKENS, USAGE
from ...manifests.shards import InputShard, Row
from ...manifests.status import Status
from ...manifests.withdrawal.applied import applied
from ...manifests.withdrawal.rows import WithdrawingReader
from ...stages.filter.marked import MarkedReader
from .messages import Assignment


class Commits(Protocol):
    """The part of a :class:`.worker.Processor` that a commit needs."""

    schema: pa.Schema
    writes_tar: bool

    def members(self, source: Row, row: dict[str, Any]) -> dict[str, bytes] | None: ...


class ShardRun:
    """A shard in progress: reader, journal and finished rows."""

    def __init__(self, artifact: Artifact, assignment: Assignment[InputShard]) -> None:
        self.artifact, self.started = artifact, time.time()
        self.shard, self.claim = assignment.shard, assignment.claim
        self.reader = self._read()
        self.journal = artifact.journal(self.shard.name)
        self.rows: dict[int, dict[str, Any]] = {}
        self.total: int | None = None  # known when the shard has been read to its end
        self.failure: str | None = None
        self.pending = 0  # rows in the pipeline

    def recall(self, rows: Sequence[Row]) -> bool:
        """Take an earlier run's results for these rows from the journal; returns whether it has all of them."""
        for row in rows:
            result = self.journal.rows.pop(row.index, None)
            if result is not None and (result["key"], result["uid"]) == (row.key, row.uid):
                self.rows[row.index] = result
        return all(row.index in self.rows for row in rows)

    def finish(self, index: int, row: dict[str, Any]) -> None:
        """Keep a row's result, unless an earlier run left one (such a row was repeated because of its chunk)."""
        if index in self.rows:
            return
        self.rows[index] = row
        if Status(row["status"]).resolved:  # an unresolved row is retried after a crash
            self.journal.append(index, row)

    @property
    def held(self) -> int:
        """Rows in the pipeline or waiting for the commit."""
        return len(self.rows) + max(self.pending, 0)

    @property
    def over(self) -> bool:
        """Whether all rows are read and none is in the pipeline: ready to commit, or to report as failed."""
        return self.total is not None and self.pending == 0

    def commit(self, processor: Commits, patience: Patience = UNLIMITED) -> ShardRecord:
        """Write and publish the shard (blocking: runs in a thread). ``patience``: with another process that commits."""
        assert self.total is not None
        name, tar = self.shard.name, processor.writes_tar
        with self.artifact.begin(name, processor.schema, tar=tar, claim=self.claim) as shard:
            if processor.writes_tar:
                for source in self._sources():  # images are read again: keeping them would cost memory
                    row = self.rows.get(source.index)
                    if row is None or row["uid"] != source.uid:
                        raise CapipeError(f"{self.shard.url}: the shard changed while it was captioned")
                    shard.write(row, processor.members(source, row))
            else:
                for index in range(self.total):
                    shard.write(self.rows[index])
            info = self.reader.info
            stats = token_sums(self.rows.values())
            record = shard.commit(
                rows_in=self.total, input_info=info, started=self.started, stats=stats, patience=patience
            )
        self.journal.delete()
        return record

    def _read(self) -> MarkedReader:
        return MarkedReader(WithdrawingReader(self.shard, applied(self.artifact)))

    def _sources(self) -> Iterator[Row]:
        """Read the input's rows again. An OSError here concerns the input, so it fails this shard, not the run."""
        try:
            yield from self._read()
        except StoreUnavailable:
            raise
        except OSError as error:
            raise CapipeError(f"{self.shard.url}: {error}") from error


def token_sums(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a shard cost, for its manifest line: the sum of each column of :data:`USAGE`, and of how many rows it is the
    sum; nothing for a stage that asks no engine."""
    asked = [row for row in rows if any(row.get(field.name) is not None for field in USAGE)]
    if not asked:
        return {}
    sums: dict[str, Any] = {ASKED: len(asked)}
    for field in USAGE:
        known = [row[field.name] for row in asked if row.get(field.name) is not None]
        sums[field.name] = [sum(known), len(known)]
    return {TOKENS: sums}
