"""The second step of `capipe filter`: scored rows into final shards. One task is one final shard, made of whole input
shards, written by one process from start to end.

First the scores alone are looked at (:mod:`.select_plan`): what is kept, the exact threshold, which input shards
go into which final one. Then images are copied. No model is loaded in either; another threshold costs the copying
alone.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ...errors import ArtifactMismatch, BadInput, CapipeError
from ...manifests.artifact import Artifact
from ...manifests.files.overwriting import refuse_overwriting
from ...manifests.files.storage import PRIVATE
from ...manifests.fingerprint import canonical
from ...manifests.manifest import ShardRecord
from ...manifests.schema import SCORE, SELECT
from ...manifests.shards import InputShard, RowReader, expand, input_artifact, join, read_places
from ...manifests.status import Status
from ...manifests.transaction import ShardTransaction
from ...stages.filter.select import (
    STAGE,
    Rule,
    SelectConfig,
    final_keys,
    final_row,
    group,
    members,
    selection_status,
    uid_list,
)
from ..runners.messages import Event
from ..runners.pool import run_pool
from ..runners.shard_queue import JobResult
from .ingest import settle, writing
from .select_plan import MARKS, SCORES, ShardPlan, ok_uids, plan_shards, read_columns

UIDS = f"{PRIVATE}/uids.npy"
_START_OVER = "use another --out, or --fresh to start over"


@dataclass(frozen=True)
class GroupTask:
    """One final shard: the input shards it is made of, in order, and how many rows these have and are kept.

    ``over``: the committed one that it takes the place of, made before some of these rows were done again.
    """

    shard: str
    shards: tuple[InputShard, ...]
    rows: int
    kept: int
    over: ShardRecord | None = None


@dataclass(frozen=True)
class SelectPlan:
    """A selection before its first image is read: the locked output and the final shards still to write."""

    found: ShardPlan
    artifact: Artifact
    tasks: list[GroupTask]
    todo: list[GroupTask]
    workers: int

    @property
    def shards(self) -> list[InputShard]:
        return [shard for task in self.tasks for shard in task.shards]


def plan_select(
    scores: Artifact,
    pattern: str,
    out: str,
    config: SelectConfig,
    *,
    marks: Artifact | None = None,
    workers: int | None = None,
    fresh: bool = False,
) -> SelectPlan:
    """Decide what is kept, lock ``out`` and find what is left to write. Raises CapipeError; then nothing was written.

    ``marks``: an artifact with a row for each input row, of which those that are not ok are not kept.
    """
    if scores.stage != "score":
        raise BadInput(f"{scores.url}: an artifact of stage {scores.stage!r}; give --scores those of `capipe filter`")
    beside = {SCORES: scores} | ({MARKS: marks} if marks is not None else {})
    shards = join(expand(pattern), beside)
    reads = read_places(pattern, shards, beside.values())
    refuse_overwriting(out, reads)
    _refuse_another_stage(out)
    found = plan_shards(shards, scores, config)
    tasks = _tasks(shards, found)
    source = input_artifact(pattern)
    semantic = {
        "select": config.model_dump(mode="json"),
        "text": found.rule.text,
        "threshold": found.rule.threshold_text,
        "input": source.fingerprint if source else None,
        **{name: artifact.fingerprint for name, artifact in beside.items()},
    }
    run = {
        "shards": pattern,
        "shards_total": len(tasks),
        "candidates": found.candidates,
        "eligible": found.eligible,
        "kept": sum(found.kept),
        **{name: artifact.url for name, artifact in beside.items()},
    }
    artifact = Artifact.create(out, STAGE, semantic, run, fresh=fresh, reads=reads)
    try:
        artifact.release_quarantine()
        todo = _todo(artifact, tasks)
    except CapipeError:
        artifact.close()
        raise
    shared = artifact.folder.is_shared and all(shard.is_shared for shard in shards)
    count = workers if workers is not None else len(os.sched_getaffinity(0))
    return SelectPlan(found, artifact, tasks, todo, min(count, len(todo)) if shared else 0)


def _refuse_another_stage(out: str) -> None:
    """`--fresh` removes what is in ``out``: that must never be anything but a selection."""
    if Artifact.exists(out) and (stage := Artifact.open(out).stage) != STAGE:
        raise BadInput(f"{out}: holds an artifact of stage {stage!r}; choose another --out")


def _tasks(shards: Sequence[InputShard], found: ShardPlan) -> list[GroupTask]:
    size = found.rule.config.shard_size
    return [
        GroupTask(
            f"{index:05d}",
            tuple(shards[at] for at in run),
            sum(found.sizes[at] for at in run),
            sum(found.kept[at] for at in run),
        )
        for index, run in enumerate(group(found.kept, size))
    ]


def _todo(artifact: Artifact, tasks: Sequence[GroupTask]) -> list[GroupTask]:
    """The tasks that are not committed, or not as they would be now: rows were done again since, or shards came.

    Raises ArtifactMismatch where a committed one was made of something else.
    """
    committed = artifact.committed()
    present = {shard.name: shard for task in tasks for shard in task.shards}
    mended = {name for name, record in committed.items() if _is_repaired(artifact, record, present)}
    todo = []
    for task in tasks:
        record = committed.pop(task.shard, None)
        made = [] if record is None else [entry["name"] for entry in record.input["shards"]]
        if task.shard in mended or made != [shard.name for shard in task.shards]:
            todo.append(replace(task, over=record))
    for record in committed.values():  # fewer rows are kept by now
        artifact.retract(record)
        for name in record.files:
            artifact.folder.remove(name)
    return todo


def _is_repaired(artifact: Artifact, record: ShardRecord, present: Mapping[str, InputShard]) -> bool:
    mended = False
    for entry in record.input["shards"]:
        shard, made = present.get(entry["name"]), replace(record, input=entry)
        if shard is None:
            text = f"{artifact.url}: shard {record.shard} was made of other input shards"
            raise ArtifactMismatch(f"{text}; {_START_OVER}")
        mended |= shard.is_repaired(made) | shard.has_repaired_companions(made)
    return mended


def execute_select(made: SelectPlan, report: Callable[[Event], None], stop: threading.Event) -> JobResult:
    """Write what is not committed yet; returns when all shards are committed or quarantined, or ``stop`` is set."""
    outcome = JobResult()
    function = functools.partial(write_group, rule=made.found.rule, artifact=made.artifact.attach())
    for result in run_pool(made.todo, function, made.workers, stop):
        settle(made.artifact, result, outcome, report)
    outcome.interrupted = stop.is_set()
    return outcome


def write_group(task: GroupTask, rule: Rule, artifact: Artifact) -> ShardRecord:
    """Write and commit one final shard. Runs in a worker process. Keeps one input shard's scores in memory."""
    own = [_scored(shard, ["key"]).column("key").to_pylist() for shard in task.shards]
    keys = final_keys([shard.name for shard in task.shards], own)
    with writing(artifact), artifact.begin(task.shard, SELECT, tar=True, over=task.over) as out:
        copied = [_copy(shard, names, rule, out) for shard, names in zip(task.shards, keys, strict=True)]
        if sum(kept for _, kept in copied) != task.kept:
            raise ArtifactMismatch(f"{task.shards[0].companions[0].url}: the scores changed while they were read")
        made = [{"name": shard.name, **info} for shard, (info, _) in zip(task.shards, copied, strict=True)]
        digest = hashlib.sha256(canonical([entry["digest"] for entry in made]).encode()).hexdigest()
        return out.commit(rows_in=task.rows, input_info={"digest": digest, "shards": made})


def _scored(shard: InputShard, columns: list[str]) -> pa.Table:
    companion = next(companion for companion in shard.companions if companion.name == SCORES)
    return read_columns(companion, SCORE, columns)  # whether it is the one that was committed is seen by the reader


def _copy(shard: InputShard, keys: list[str], rule: Rule, out: ShardTransaction) -> tuple[dict[str, Any], int]:
    """All rows of an input shard, the kept ones with their samples. What was read, and how many were kept."""
    failed = [-1] * len(keys) if rule.keep is None else rule.keep.failures(_scored(shard, rule.columns)).tolist()
    reader, kept = RowReader(shard), 0
    for source, key, term in zip(reader, keys, failed, strict=True):  # the reader first: it checks that this was all
        row = source.beside[SCORES]
        status, error = selection_status(row, source.beside.get(MARKS), rule, term)
        final = final_row(row, status, error, key, shard.name, rule.text)
        sample = members(source, final)
        if status == Status.OK and sample is None:
            raise ArtifactMismatch(f"{shard.url}: {source.key!r} has scores, but no image ({source.error})")
        kept += status == Status.OK
        out.write(final, sample)
    return reader.info, kept


def write_uids(artifact: Artifact) -> None:
    """DataComp's list of what was kept; the last file of a selection that is complete."""
    data = io.BytesIO()
    np.save(data, uid_list(ok_uids(artifact)), allow_pickle=False)
    artifact.folder.write(UIDS, data.getvalue())
