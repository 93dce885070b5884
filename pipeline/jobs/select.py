"""Second step of `capipe filter`: turns scored rows into final shards.

One task is one final shard, made of whole input shards and written by one process. First only the scores are read
(:mod:`.select_plan`): this gives the kept rows, the exact threshold, and the input shards of each final one. Then
images are copied, or an index over the original tars is written, which reads none of them. No model is loaded in either
part; another threshold only costs the copying.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import ArtifactMismatch, BadInput, CapipeError
from ...manifests.artifact import Artifact
from ...manifests.files.overwriting import refuse_overwriting
from ...manifests.files.storage import PRIVATE, Folder
from ...manifests.fingerprint import canonical
from ...manifests.manifest import ShardRecord
from ...manifests.schema import SCORE
from ...manifests.shards import InputShard, expand, input_artifact, join, read_places
from ...manifests.status import Status
from ...manifests.transaction import ShardTransaction
from ...manifests.withdrawal.applied import Withdrawal, applied, apply, has_withdrawn
from ...manifests.withdrawal.rows import WithdrawingReader, blank, is_withdrawn
from ...manifests.withdrawal.uid_set import EMPTY, UidSet
from ...stages import last_files
from ...stages.filter import saved_plan
from ...stages.filter.index import ListedRows, TarFacts
from ...stages.filter.joined import Source, joined_row
from ...stages.filter.marked import MARKS
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
from ..runners.placement import TaskPlacement, task_placement
from ..runners.pool_job import local_paths, refuse_taking_back, run_pool_job
from ..runners.ray.cluster import RayCluster
from ..runners.shard_queue import JobResult
from .joined.columns import SCORES, companion_of, deciding_columns, read_columns
from .joined.sources import Joined
from .select_plan import SelectCosts, ShardPlan, costs, ok_uids, plan_shards

UIDS, REPORT = f"{PRIVATE}/uids.npy", f"{PRIVATE}/report.html"
_START_OVER = "use another --out, or --fresh to start over"
Listed = tuple[dict[str, Any], int]  # an input shard's entry for the manifest, and the number of its rows that are kept


@dataclass(frozen=True)
class GroupTask:
    """One final shard: its input shards in order, their number of rows, and how many of these are kept.

    ``tars``: for an index, facts about the tars of its input shards. ``over``: the committed shard that it replaces,
    made before some of these rows were redone.
    """

    shard: str
    shards: tuple[InputShard, ...]
    rows: int
    kept: int
    tars: tuple[TarFacts, ...] = ()
    over: ShardRecord | None = None


@dataclass(frozen=True)
class SelectPlan:
    """A selection before its first image is read: the locked output and the final shards left to write."""

    selection: ShardPlan
    costs: SelectCosts
    withdrawal: Withdrawal
    artifact: Artifact
    tasks: list[GroupTask]
    todo: list[GroupTask]
    placement: TaskPlacement
    sources: tuple[Source, ...] = ()

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
    joined: Sequence[Joined] = (),
    drop: UidSet | None = None,
    workers: int | None = None,
    fresh: bool = False,
    share: bool = False,
    cluster: RayCluster | None = None,
) -> SelectPlan:
    """Select rows, lock ``out`` and find the shards left to write. Raises CapipeError; then nothing was written.

    ``marks``: an artifact with a row for each input row; rows that are not ok there are not kept. ``joined``: further
    sources of columns, those of ``config.columns`` among them. ``drop``: withdrawn images. If only these grew since
    ``out`` was made, the threshold of ``top`` and the bounds of the final shards stay: withdrawal takes rows out and
    lets none in.
    """
    source = input_artifact(pattern)
    sidecars, shards = _with_sidecars(scores, pattern, marks, source, joined)
    sources = tuple(one.source for one in joined)
    reads = read_places(pattern, shards, sidecars.values())
    refuse_overwriting(out, reads)
    _refuse_another_stage(out)
    made_of = {
        "select": config.model_dump(mode="json"),
        "input": source.fingerprint if source else None,
        **{name: artifact.fingerprint for name, artifact in sidecars.items()},
    }
    before = None if fresh or (drop is None and not has_withdrawn(scores)) else _before(out, made_of)
    threshold = None if before is None else before.config["semantic"]["threshold"]
    digest = saved_plan.decided_by(shards, config, (drop or EMPTY).sha256, threshold)
    saved = None if fresh else saved_plan.read(Folder(out), digest)
    if saved is None:
        selection = plan_shards(shards, scores, config, drop or EMPTY, threshold, sources)
    else:
        selection = ShardPlan.of_json(config, saved)
    tars = tar_facts(shards, scores) if config.index else {}
    tasks = _tasks(shards, selection, tars, before)
    semantic = {**made_of, "text": selection.rule.text, "threshold": selection.rule.threshold_text}
    run = {
        "shards": pattern,
        "shards_total": len(tasks),
        "candidates": selection.candidates,
        "eligible": selection.eligible,
        "kept": sum(selection.kept),
        **({"missing": dict(selection.missing)} if joined else {}),
        **({"tars": _digest_of(tars)} if config.index else {}),
        **{name: artifact.url for name, artifact in sidecars.items()},
    }
    artifact = Artifact.create(out, STAGE, semantic, run, fresh=fresh, share=share, reads=reads)
    try:
        saved_plan.write(artifact.folder, digest, selection.as_json())
        withdrawal = apply(artifact, drop)
        if not share:
            artifact.release_quarantine()
        todo = _todo(artifact, tasks, withdrawal.touched)
    except CapipeError:
        artifact.close()
        raise
    shared = artifact.folder.is_shared and all(shard.is_shared for shard in shards)
    placement = task_placement(workers, shared, cluster).at_most(len(todo))
    estimated = costs(shards, scores, selection)
    return SelectPlan(selection, estimated, withdrawal, artifact, tasks, todo, placement, sources)


def preview_select(
    scores: Artifact,
    pattern: str,
    config: SelectConfig,
    marks: Artifact | None = None,
    drop: UidSet | None = None,
    joined: Sequence[Joined] = (),
) -> tuple[ShardPlan, SelectCosts]:
    """What :func:`plan_select` would select in a new folder, and its costs. Writes nothing. Raises CapipeError."""
    _, shards = _with_sidecars(scores, pattern, marks, input_artifact(pattern), joined)
    sources = [one.source for one in joined]
    selection = plan_shards(shards, scores, config, drop or EMPTY, sources=sources)
    return selection, costs(shards, scores, selection)


def _with_sidecars(
    scores: Artifact, pattern: str, marks: Artifact | None, source: Artifact | None, joined: Sequence[Joined]
) -> tuple[dict[str, Artifact], list[InputShard]]:
    """Sidecars by name, and the shards joined with them. ``source``: the artifact that the pattern names, if any."""
    if scores.stage != "score":
        raise BadInput(f"{scores.url}: an artifact of stage {scores.stage!r}; give --scores those of `capipe filter`")
    sidecars = {SCORES: scores} | {one.source.name: one.artifact for one in joined}
    if marks is not None:
        sidecars[MARKS] = marks
    return sidecars, join(expand(pattern, source), sidecars)


def _refuse_another_stage(out: str) -> None:
    """Raise BadInput if ``out`` has an artifact of another stage: `--fresh` removes its contents."""
    if Artifact.exists(out) and (stage := Artifact.open(out).stage) != STAGE:
        raise BadInput(f"{out}: holds an artifact of stage {stage!r}; choose another --out")


def _before(out: str, made_of: Mapping[str, Any]) -> Artifact | None:
    """The selection in ``out``, if it was made of the same things by the same options."""
    if not Artifact.exists(out):
        return None
    artifact = Artifact.open(out)
    same = all(artifact.config["semantic"].get(name) == value for name, value in made_of.items())
    return artifact if same else None


def tar_facts(shards: Sequence[InputShard], scores: Artifact) -> dict[str, TarFacts]:
    """Facts about the shards' tars, by shard; their bytes are not read."""
    scored = scores.committed()
    return {shard.name: TarFacts.of(shard, scored[shard.name]) for shard in shards}


def _digest_of(tars: Mapping[str, TarFacts]) -> dict[str, Any]:
    """The tars of an index as a whole, for its configuration; each has its own sha256 in the manifest."""
    marks = [[name, tar.sha256] for name, tar in tars.items()]
    total = sum(tar.bytes for tar in tars.values())
    return {"count": len(tars), "bytes": total, "digest": hashlib.sha256(canonical(marks).encode()).hexdigest()}


def _tasks(
    shards: Sequence[InputShard], selection: ShardPlan, tars: Mapping[str, TarFacts], before: Artifact | None
) -> list[GroupTask]:
    """Final shards with the bounds of those made ``before``, if all of them are there."""
    bounds = None if before is None else _bounds(before, [shard.name for shard in shards])
    return [
        GroupTask(
            f"{index:05d}",
            tuple(shards[at] for at in run),
            sum(selection.sizes[at] for at in run),
            sum(selection.kept[at] for at in run),
            tuple(tars[shards[at].name] for at in run) if tars else (),
        )
        for index, run in enumerate(bounds or group(selection.kept, selection.rule.config.shard_size))
    ]


def _bounds(before: Artifact, shards: Sequence[str]) -> list[range] | None:
    """Runs of input shards of a selection's final shards; None if these are not of all ``shards``."""
    runs = [[entry["name"] for entry in record.input["shards"]] for record in before.committed().values()]
    if [name for run in runs for name in run] != list(shards):
        return None
    ends = list(itertools.accumulate(map(len, runs), initial=0))
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def _todo(artifact: Artifact, tasks: Sequence[GroupTask], touched: Collection[str]) -> list[GroupTask]:
    """Tasks not committed, or outdated: rows were redone or withdrawn since (``touched``), or shards were added.

    Raises ArtifactMismatch if a committed one has other inputs.
    """
    committed = artifact.committed()
    present = {shard.name: shard for task in tasks for shard in task.shards}
    repaired = {name for name, record in committed.items() if _is_repaired(artifact, record, present)} | {*touched}
    todo = []
    for task in tasks:
        record = committed.pop(task.shard, None)
        names = [] if record is None else [entry["name"] for entry in record.input["shards"]]
        if task.shard in repaired or names != [shard.name for shard in task.shards]:
            todo.append(replace(task, over=record))
    for record in committed.values():  # fewer rows are kept now
        refuse_taking_back(artifact, f"{artifact.url}: fewer shards are selected now")
        artifact.retract(record)
        for name in record.files:
            artifact.folder.remove(name)
    return todo


def _is_repaired(artifact: Artifact, record: ShardRecord, present: Mapping[str, InputShard]) -> bool:
    repaired = False
    for entry in record.input["shards"]:
        shard, part = present.get(entry["name"]), replace(record, input=entry)
        if shard is None:
            text = f"{artifact.url}: shard {record.shard} was made of other input shards"
            raise ArtifactMismatch(f"{text}; {_START_OVER}")
        repaired |= shard.is_repaired(part) | shard.has_repaired_companions(part)
    return repaired


def execute_select(plan: SelectPlan, report: Callable[[Event], None], stop: threading.Event) -> JobResult:
    """Write uncommitted shards; returns when all are committed or quarantined, or ``stop`` is set."""
    write = functools.partial(write_group, rule=plan.selection.rule, sources=plan.sources)
    reads = local_paths([shard.url for shard in plan.shards[:1]])
    return run_pool_job(
        *(plan.todo, write, plan.artifact, plan.placement, report, stop),
        shard_name=lambda task: task.shard,
        over=lambda task: [task.over],
        reads=reads,
    )


def write_group(task: GroupTask, rule: Rule, sources: Sequence[Source], artifact: Artifact) -> ShardRecord:
    """Write and commit one final shard, in a worker process. Keeps one input shard's scores in memory."""
    uids, decided = applied(artifact), _Decided(rule, sources, rule.schema.names)
    with artifact.begin(task.shard, rule.schema, tar=not task.tars, over=task.over) as out:
        shards = [_copied(shard, out) for shard in task.shards]
        input_keys = [_keys(shard) for shard in shards]
        keys = final_keys([shard.name for shard in shards], input_keys)
        if task.tars:
            parts = zip(shards, keys, task.tars, strict=True)
            written = [_list(shard, names, decided, out, uids, tar) for shard, names, tar in parts]
        else:
            written = [_copy(shard, names, decided, out, uids) for shard, names in zip(shards, keys, strict=True)]
        if sum(kept for _, kept in written) != task.kept:
            raise ArtifactMismatch(f"{task.shards[0].companions[0].url}: the scores changed while they were read")
        inputs = [{"name": shard.name, **info} for shard, (info, _) in zip(task.shards, written, strict=True)]
        digest = hashlib.sha256(canonical([entry["digest"] for entry in inputs]).encode()).hexdigest()
        return out.commit(rows_in=task.rows, input_info={"digest": digest, "shards": inputs})


def _copied(shard: InputShard, out: ShardTransaction) -> InputShard:
    """The shard with local copies of companions in a store, which are read several times here, until the commit."""
    copies = [c.copied(out.scratch, f"{c.name}-{shard.name}.parquet") for c in shard.companions]
    return replace(shard, companions=tuple(copies))


def _keys(shard: InputShard) -> list[str]:
    table = read_columns(companion_of(shard, SCORES), SCORE, ["key"])
    keys: list[str] = table.column("key").to_pylist()  # the row reader checks that it is the committed file
    return keys


@dataclass(frozen=True)
class _Decided:
    """What decides about rows when they are written: as when they were planned."""

    rule: Rule
    sources: Sequence[Source]
    names: Sequence[str]  # of all columns

    def terms(self, shard: InputShard, keys: list[str]) -> Iterator[tuple[str, int]]:
        """For each row its key in the final shard, and the term of ``keep`` that it fails, else -1."""
        failed = [-1] * len(keys)
        if self.rule.keep is not None:
            failed = self.rule.keep.failures(deciding_columns(shard, self.rule, self.sources)).tolist()
        return zip(keys, failed, strict=True)

    def final(
        self, beside: Mapping[str, Mapping[str, Any]], key: str, term: int, shard: InputShard, uids: UidSet
    ) -> dict[str, Any]:
        """The row of the final shard, of the rows of all sidecars."""
        row = joined_row(beside[SCORES], beside, self.sources)
        if is_withdrawn(row["uid"], beside.values(), uids):
            row = blank(row)
        status, error = selection_status(row, beside.get(MARKS), self.rule, term)
        final = final_row(row, status, error, key, shard.name, self.rule.text)
        return {name: final[name] for name in self.names}


def _copy(shard: InputShard, keys: list[str], decided: _Decided, out: ShardTransaction, uids: UidSet) -> Listed:
    """Copy an input shard's rows, the kept ones with their samples; returns the reader's info and the kept count."""
    reader, kept, named = WithdrawingReader(shard, uids), 0, decided.terms(shard, keys)
    for source, (key, term) in zip(reader, named, strict=True):  # the reader first: at its end it checks the tar
        final = decided.final(source.beside, key, term, shard, uids)
        sample = members(source, final)
        if final["status"] == Status.OK and sample is None:
            raise ArtifactMismatch(f"{shard.url}: {source.key!r} has scores, but no image ({source.error})")
        kept += final["status"] == Status.OK
        out.write(final, sample)
    return reader.info, kept


def _list(
    shard: InputShard, keys: list[str], decided: _Decided, out: ShardTransaction, uids: UidSet, tar: TarFacts
) -> Listed:
    """The same rows for an index, without samples; the shard's tar is not opened."""
    reader, kept, named = ListedRows(shard, tar), 0, decided.terms(shard, keys)
    for beside, (key, term) in zip(reader, named, strict=True):
        final = decided.final(beside, key, term, shard, uids)
        kept += final["status"] == Status.OK
        out.write(final)
    return reader.info, kept


def write_last(artifact: Artifact, report: Callable[[], bytes]) -> None:
    """Write the last files of a complete selection, unless they are there: its ``report``, and DataComp's list of kept
    uids."""
    run = artifact.config["run"]
    shown = [run[name] for name in ("scores", "candidates", "kept", "missing") if name in run]
    digest = last_files.digest_of(artifact, shown)
    if last_files.are_there(artifact, digest):
        return
    files = {REPORT: report(), UIDS: _uids(artifact)}
    for name, data in files.items():
        artifact.folder.write(name, data)
    sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    last_files.note(artifact, digest, sums)


def _uids(artifact: Artifact) -> bytes:
    data = io.BytesIO()
    np.save(data, uid_list(ok_uids(artifact)), allow_pickle=False)
    return data.getvalue()
