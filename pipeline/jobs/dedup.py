"""Job of `capipe dedup`: hashes every image (in parallel), then groups duplicates (in one step).

Three artifacts in the output folder: ``hashes`` of the shards, ``against`` for the reference sets, and ``marked``, with
a row for every row of the shards. Each is resumed independently.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ...errors import ArtifactMismatch, BadInput, CapipeError
from ...manifests.artifact import Artifact
from ...manifests.files.overwriting import refuse_overwriting
from ...manifests.manifest import ShardRecord
from ...manifests.shards import InputShard, expand, input_artifact, join, read_places
from ...stages.dedup import marks as dedup
from ...stages.dedup.arrays import Numbers
from ...stages.dedup.embeddings.reading import check_embeddings, check_same_space, read_references
from ...stages.dedup.embeddings.work import EmbeddingSearch, NearFiles
from ...stages.dedup.hash_sets import HashSet, read_hash_set
from ...stages.dedup.keeper_column import check_column, read_column
from ...stages.dedup.marks import FARTHEST, NEAREST, DedupConfig
from ...stages.dedup.near.work import NearSearch
from ...stages.ingest.shard import IngestTask, pending
from ...stages.ingest.shard import plan as cut
from ...stages.ingest.sources import open_sources, source_places
from ..runners.messages import Event
from ..runners.placement import TaskPlacement, task_placement
from ..runners.pool_job import local_paths, refuse_taking_back, run_pool_job
from ..runners.ray.cluster import RayCluster
from ..runners.shard_queue import JobResult
from ..runners.task_worker import ShardWriter
from .near_search import near_files, open_work, remove_work, run_search

HASHES, AGAINST, MARKED = "hashes", "against", "marked"
Task = TypeVar("Task", InputShard, IngestTask)


@dataclass(frozen=True)
class DedupPlan:
    """A dedup run before its first image. ``against``: reference sets, possibly none.

    ``embeddings``: of the images, ``width`` numbers each, and ``references``, those of reference sets; ``scores``: has
    the column by which keepers are chosen; ``devices``: compare embeddings.
    """

    config: DedupConfig
    pattern: str
    shards: list[InputShard]
    against: tuple[str, ...]
    embeddings: Artifact | None
    width: int
    references: tuple[Artifact, ...]
    scores: Artifact | None
    devices: tuple[str, ...]
    out: str
    placement: TaskPlacement
    fresh: bool
    share: bool
    marked: str = MARKED  # folder of the marks in ``out``

    @property
    def reads(self) -> list[str]:
        """Local paths of the images."""
        return local_paths([*(shard.url for shard in self.shards[:1]), *self.against])


def plan_dedup(
    shards: str,
    out: str,
    config: DedupConfig,
    *,
    against: Sequence[str] = (),
    embeddings: str | None = None,
    against_embeddings: Sequence[str] = (),
    scores: str | None = None,
    devices: Sequence[str] = (),
    workers: int | None = None,
    fresh: bool = False,
    share: bool = False,
    cluster: RayCluster | None = None,
    marked: str = MARKED,
) -> DedupPlan:
    """Check shards, reference sets and embeddings. Raises BadInput; nothing is written."""
    inputs = expand(shards)
    names = [shard.name for shard in inputs]
    embedded, width, scored = None, 0, None
    references = tuple(Artifact.open(url) for url in against_embeddings)
    if embeddings is not None:
        embedded = Artifact.open(embeddings)
        width = check_embeddings(embedded, names)
        for reference in references:
            check_same_space(embedded, width, reference)
    if scores is not None:
        scored = Artifact.open(scores)
        check_column(scored, names, config.keeper)
    open_sources(against, follow_links=True)  # raises if a set contains no images
    companions = [artifact for artifact in (embedded, scored, *references) if artifact is not None]
    reads = [*read_places(shards, inputs, companions), *source_places(against)]
    for name in (HASHES, AGAINST, marked):
        refuse_overwriting(f"{out.rstrip('/')}/{name}", reads)
    shared = all(shard.is_shared for shard in inputs) and not any(url.startswith("memory:") for url in (out, *against))
    placement = task_placement(workers, shared, cluster)
    given = (tuple(against), embedded, width, references, scored, tuple(devices))
    return DedupPlan(config, shards, inputs, *given, out.rstrip("/"), placement, fresh, share, marked)


def hash_images(plan: DedupPlan, report: Callable[[Event], None], stop: threading.Event) -> tuple[Artifact, JobResult]:
    """First pass over the shards; committed, unchanged shards are skipped."""
    source = input_artifact(plan.pattern)
    semantic = {"input": source.fingerprint if source else None}
    run = {"shards": plan.pattern, "shards_total": len(plan.shards)}

    def todo(artifact: Artifact) -> list[InputShard]:
        committed = artifact.committed()
        for shard in plan.shards:
            if shard.name in committed and shard.is_repaired(committed[shard.name]):
                refuse_taking_back(artifact, f"{shard.url}: some of its rows were done again since")
                artifact.retract(committed.pop(shard.name))
        return [shard for shard in plan.shards if shard.name not in committed]

    artifact, tasks = open_first_pass(f"{plan.out}/{HASHES}", semantic, run, todo, plan.fresh, plan.share)
    result = _hash(artifact, tasks, dedup.hash_shard, lambda task: task.name, plan, report, stop)
    return artifact, result


def hash_references(
    plan: DedupPlan, report: Callable[[Event], None], stop: threading.Event
) -> tuple[Artifact, JobResult]:
    """First pass over the reference sets. Raises BadInput if none of their images can be decoded."""
    # Links may lead anywhere: only hashes of a reference set are kept.
    tasks = list(cut(open_sources(plan.against, follow_links=True), dedup.REFERENCES))
    run = {"sources": list(plan.against), "shards_total": len(tasks)}
    artifact, todo = open_first_pass(
        f"{plan.out}/{AGAINST}", {}, run, lambda artifact: list(pending(tasks, artifact)), plan.fresh, plan.share
    )
    result = _hash(artifact, todo, dedup.hash_references, lambda task: task.shard, plan, report, stop)
    rows = [record.rows for record in artifact.committed().values()]
    if len(rows) == len(tasks) and not any(statuses.get("ok") for statuses in rows):
        artifact.close()
        items = sum(sum(statuses.values()) for statuses in rows)
        text = f"{', '.join(plan.against)}: not one of {items} items can be decoded"
        raise BadInput(f"{text}; name a reference set of images")
    return artifact, result


def mark(
    plan: DedupPlan,
    hashes: Artifact,
    against: Artifact | None,
    report: Callable[[Event], None],
    stop: threading.Event,
) -> tuple[Artifact, JobResult]:
    """Second pass: group all images and mark every row; skipped if all marks are committed.

    If images were added or read since, all are grouped again and every shard is marked again.
    """
    names = [shard.name for shard in plan.shards]
    references = sorted(against.committed()) if against is not None else []
    semantic = {
        "dedup": plan.config.semantic(),
        "input": hashes.config["semantic"]["input"],
        "against": dedup.digest_of(against, references) if against is not None else None,
    }
    grouped = dedup.digest_of(hashes, names)  # digest of everything that marks depend on beside the configuration
    companions = _companions(plan)
    for name, artifact in companions.items():
        semantic[name] = artifact.fingerprint
        grouped += dedup.digest_of(artifact, names)
    if plan.references:
        semantic["against_embeddings"] = [_digest(artifact) for artifact in plan.references]
    run = {"shards": plan.pattern, "shards_total": len(names), "sources": list(plan.against)}
    url = f"{plan.out}/{plan.marked}"
    artifact = Artifact.create(url, dedup.STAGE, semantic, run, fresh=plan.fresh, share=plan.share)
    try:
        committed, records = artifact.committed(), hashes.committed()
        shards = join(plan.shards, companions)
        for shard in shards:
            if shard.name in committed:
                shard.has_repaired_companions(committed[shard.name])  # raises if they are different ones
        if removed := sorted(set(committed) - set(names)):
            text = f"{artifact.url}: holds marks of shard {removed[0]}, which --shards does not name"
            raise ArtifactMismatch(f"{text}; name all of them, or use --fresh to start over")
        if len(_marked(artifact, grouped)) == len(names):
            return artifact, JobResult()
        if committed and any(record.input.get("grouped") != grouped for record in committed.values()):
            refuse_taking_back(artifact, f"{hashes.url}: images were added or done again since")
        reference_set = read_hash_set(against, references) if against is not None else None
        hash_set = read_hash_set(hashes, names)
        search = NearSearch(hash_set, reference_set, plan.config.radius)
        work = open_work(artifact, search, {"hashes": grouped, "against": semantic["against"]})
        try:
            if len(done := _marked(artifact, grouped)) < len(names):  # by another process that shares the folder
                near = run_search(search, work, plan.placement, report, stop)
                marks = None if near is None else _grouped(plan, hash_set, reference_set, near, artifact, report, stop)
                if marks is None:
                    return artifact, JobResult(interrupted=True)
                todo = [shard for shard in shards if shard.name not in done]
                info = _infos(shards, grouped)
                write = functools.partial(_mark_shard, marks=marks, hashed=records, info=info, over=committed)
                where = plan.placement.here()
                job = run_pool_job(todo, write, artifact, where, report, stop, shard_name=lambda shard: shard.name)
                if job.interrupted or job.quarantined:
                    return artifact, job
            remove_work(artifact, work)
        finally:
            work.close()
    except BaseException:
        artifact.close()
        raise
    return artifact, JobResult(interrupted=stop.is_set())


def _marked(artifact: Artifact, grouped: str) -> set[str]:
    """Shards whose marks depend on everything that they depend on now."""
    return {name for name, record in artifact.committed().items() if record.input.get("grouped") == grouped}


def _infos(shards: Sequence[InputShard], grouped: str) -> dict[str, dict[str, Any]]:
    """What the manifest notes of the input of each shard of marks."""
    return {
        shard.name: {"grouped": grouped, "companions": {c.name: c.sha256 for c in shard.companions}} for shard in shards
    }


def _mark_shard(
    shard: InputShard,
    *,
    marks: dedup.Marks,
    hashed: Mapping[str, ShardRecord],
    info: Mapping[str, Mapping[str, Any]],
    over: Mapping[str, ShardRecord],
    artifact: Artifact,
) -> ShardRecord:
    name = shard.name
    return dedup.mark_shard(name, hashed[name], marks, artifact, info[name], over.get(name))


def _companions(plan: DedupPlan) -> dict[str, Artifact]:
    """Artifacts with a row for every row of the shards that marks depend on."""
    given = {"embeddings": plan.embeddings, "scores": plan.scores}
    return {name: artifact for name, artifact in given.items() if artifact is not None}


def _digest(artifact: Artifact) -> str:
    return dedup.digest_of(artifact, sorted(artifact.committed()))


def _grouped(
    plan: DedupPlan,
    hash_set: HashSet,
    reference_set: HashSet | None,
    near: dedup.Pairs,
    marked: Artifact,
    report: Callable[[Event], None],
    stop: threading.Event,
) -> dedup.Marks | None:
    """The groups of what is near by hashes and by embeddings, None if the search was stopped."""
    if plan.embeddings is None or plan.config.cosine is None:
        preference = _preference(plan, hash_set, None)
        return dedup.find_marks(hash_set, reference_set, plan.config, near, preference=preference)
    made_from = {
        "hashes": dedup.digest_of(hash_set.artifact, hash_set.shards),
        "embeddings": dedup.digest_of(plan.embeddings, hash_set.shards),
        "against": [_digest(artifact) for artifact in plan.references],
    }
    references = read_references(plan.references) if plan.references else None
    search = EmbeddingSearch(hash_set, plan.embeddings, references, plan.width, plan.config.cosine, plan.devices)
    files = len(hash_set.contents)
    embedded = near_files(search, hash_set.artifact, files, made_from, plan.placement, report, stop)
    if embedded is None:
        return None
    marked.note(embeddings=plan.embeddings.url, embeddings_skipped=int(np.isnan(embedded.similar).sum()))
    preference = _preference(plan, hash_set, embedded)
    return dedup.find_marks(hash_set, reference_set, plan.config, near, embedded, references, preference)


def _preference(plan: DedupPlan, hash_set: HashSet, embedded: NearFiles | None) -> Numbers | None:
    """What the keeper of a group has most of, for each file; None for its pixels alone."""
    if plan.scores is not None:
        return read_column(plan.scores, hash_set, plan.config.keeper)
    if embedded is not None and plan.config.keeper in (NEAREST, FARTHEST):
        return embedded.similar if plan.config.keeper == NEAREST else -embedded.similar
    return None


def open_first_pass(
    url: str,
    semantic: Mapping[str, object],
    run: Mapping[str, object],
    todo: Callable[[Artifact], list[Task]],
    fresh: bool,
    share: bool,
    stage: str = dedup.HASH_STAGE,
) -> tuple[Artifact, list[Task]]:
    """The artifact of a first pass and its missing tasks. ``fresh`` only starts over if the images differ: another
    radius does not require hashing all images again."""
    try:
        return _create(url, stage, semantic, run, todo, share=share)
    except ArtifactMismatch:
        if not fresh:
            raise
    return _create(url, stage, semantic, run, todo, fresh=True)


def _create(
    url: str,
    stage: str,
    semantic: Mapping[str, object],
    run: Mapping[str, object],
    todo: Callable[[Artifact], list[Task]],
    *,
    fresh: bool = False,
    share: bool = False,
) -> tuple[Artifact, list[Task]]:
    artifact = Artifact.create(url, stage, semantic, run, fresh=fresh, share=share)
    try:
        if not share:
            artifact.release_quarantine()
        return artifact, todo(artifact)
    except CapipeError:
        artifact.close()
        raise


def _hash(
    artifact: Artifact,
    tasks: Iterable[Task],
    hash_images: ShardWriter[Task],
    shard_name: Callable[[Task], str],
    plan: DedupPlan,
    report: Callable[[Event], None],
    stop: threading.Event,
) -> JobResult:
    try:
        return run_pool_job(
            *(tasks, hash_images, artifact, plan.placement, report, stop), shard_name=shard_name, reads=plan.reads
        )
    except BaseException:
        artifact.close()
        raise
