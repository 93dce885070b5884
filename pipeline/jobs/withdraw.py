"""Withdrawal from an artifact with rows of its own: committed shards with listed uids are rewritten without a model."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow as pa

from ...errors import CapipeError, DamagedShard
from ...manifests.artifact import Artifact
from ...manifests.files.store_errors import StoreUnavailable
from ...manifests.manifest import REPLACES, ShardRecord
from ...manifests.samples import Sample, read_samples
from ...manifests.shards import Row
from ...manifests.status import Status
from ...manifests.transaction import ROW_GROUP, ShardTransaction
from ...manifests.withdrawal.applied import Withdrawal, applied, apply
from ...manifests.withdrawal.rows import REASON
from ...manifests.withdrawal.uid_set import UidSet
from ...stages.export.source import check_digest, committed_listing
from ..runners.interrupts import interrupts
from ..runners.placement import task_placement
from ..runners.pool_job import run_pool_job

WORTH_PROCESSES = 4  # shards to rewrite; fewer are done sooner than processes start
PassedOn = Callable[[Row], dict[str, Any]]  # a stage's output row for an input row that it did not process


def withdraw(artifact: Artifact, uids: UidSet | None, schema: pa.Schema, passed_on: PassedOn) -> Withdrawal | None:
    """Apply a list to a locked artifact, and rewrite its committed shards with rows of newly listed uids.

    ``schema``, ``passed_on``: those of its stage; the latter must be a module's function. Returns None if a signal
    stopped it: the same command goes on. Closes the artifact and raises CapipeError if the list cannot be applied.
    """
    try:
        withdrawal = apply(artifact, uids)
        tasks = list(withdrawal.touched.values())
        if not tasks:
            return withdrawal
        write = functools.partial(_rewrite, schema=schema, passed_on=passed_on)
        some = len(tasks) if len(tasks) >= WORTH_PROCESSES else 0
        placement, stop = task_placement(None, artifact.folder.is_shared).at_most(some), threading.Event()
        with interrupts(stop.set):
            result = run_pool_job(
                *(tasks, write, artifact, placement, lambda event: None, stop),
                shard_name=lambda record: record.shard,
                over=lambda record: [record],
            )
        if result.interrupted:
            artifact.close()
            return None
        if not result.quarantined:
            withdrawal.conclude()
        return withdrawal
    except CapipeError:
        artifact.close()
        raise


def _rewrite(record: ShardRecord, schema: pa.Schema, passed_on: PassedOn, artifact: Artifact) -> ShardRecord:
    """A new version of a shard: rows of listed uids are withdrawn, the others, and their samples, stay as they are."""
    name = f"{record.shard}.tar"
    if name not in record.files:
        with artifact.begin(record.shard, schema, over=record) as out:
            return _copy(record, passed_on, artifact, out, None)
    digest = hashlib.sha256()
    with _opened(artifact, name) as stream, artifact.begin(record.shard, schema, tar=True, over=record) as out:
        samples = read_samples(stream, digest=digest)
        return _copy(record, passed_on, artifact, out, _Samples(samples, digest, record, artifact))


def _opened(artifact: Artifact, name: str) -> BinaryIO:
    try:
        return artifact.folder.open(name)
    except StoreUnavailable:
        raise
    except OSError as error:
        text = f"{artifact.url}/{name}: cannot be read ({error.strerror or error}), and its shard has withdrawn images"
        raise DamagedShard(f"{text}; restore it, or run the command with --fresh") from None


class _Samples:
    """Samples of a shard's tar, for its ok rows in order."""

    def __init__(self, samples: Any, digest: Any, record: ShardRecord, artifact: Artifact) -> None:
        self._samples, self._digest, self._record, self._artifact = samples, digest, record, artifact

    def of(self, key: str) -> dict[str, bytes]:
        sample: Sample | None = next(self._samples, None)
        if sample is None or sample.key != key:
            where = f"{self._artifact.url}/{self._record.shard}.tar"
            raise DamagedShard(f"{where}: holds no {key!r} where its Parquet lists it; restore both")
        return {extension: member.data or b"" for extension, member in sample.members.items()}

    def end(self) -> None:
        for _ in self._samples:
            pass
        check_digest(self._digest.hexdigest(), self._record, f"{self._record.shard}.tar", self._artifact)


def _copy(
    record: ShardRecord, passed_on: PassedOn, artifact: Artifact, out: ShardTransaction, samples: _Samples | None
) -> ShardRecord:
    uids, index = applied(artifact), 0
    with committed_listing(artifact, record) as listed:
        for batch in listed.iter_batches(ROW_GROUP, use_threads=False):
            for row in batch.to_pylist():
                members = samples.of(row["key"]) if samples is not None and row["status"] == Status.OK else None
                if row["uid"] in uids:
                    row = passed_on(Row(index, row["key"], row["uid"], Status.WITHDRAWN, REASON))
                    members = None
                out.write(row, members)
                index += 1
    if samples is not None:
        samples.end()
    stats = {name: value for name, value in record.stats.items() if name != REPLACES}
    return out.commit(rows_in=record.count, input_info=record.input, stats=stats)
