"""`capipe dedup`, put together: what every image looks like (in parallel), then who repeats whom (all at once).

Three artifacts in the output folder: ``hashes`` of the shards, ``against`` of the reference sets, and ``marked``, which
has a row for every row of the shards. Each is resumed by itself.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...errors import ArtifactMismatch, BadInput, CapipeError, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.files.overwriting import refuse_overwriting
from ...manifests.manifest import ShardRecord
from ...manifests.shards import InputShard, expand, input_artifact, join, read_places
from ...stages.dedup import marks as dedup
from ...stages.dedup.embeddings import check_embeddings, near_embeddings
from ...stages.dedup.hash_sets import HashSet, read_hash_set
from ...stages.dedup.marks import DedupConfig
from ...stages.dedup.near_hashes import Indices
from ...stages.ingest.shard import IngestTask, pending
from ...stages.ingest.shard import plan as cut
from ...stages.ingest.sources import open_sources, source_places
from ..runners.messages import Event, Pulse, ShardDone, ShardFailed
from ..runners.pool import Done, run_pool
from ..runners.shard_queue import JobResult
from ..runners.worker import disk_text
from .ingest import HOPELESS

HASHES, AGAINST, MARKED = "hashes", "against", "marked"
Task = TypeVar("Task", InputShard, IngestTask)


@dataclass(frozen=True)
class DedupPlan:
    """A dedup before its first image. ``against`` is empty where there is no reference set."""

    config: DedupConfig
    pattern: str
    shards: list[InputShard]
    against: tuple[str, ...]
    embeddings: Artifact | None
    out: str
    workers: int
    fresh: bool


def plan_dedup(
    shards: str,
    out: str,
    config: DedupConfig,
    *,
    against: Sequence[str] = (),
    embeddings: str | None = None,
    workers: int | None = None,
    fresh: bool = False,
) -> DedupPlan:
    """Check shards, reference sets and embeddings. Raises BadInput; nothing is written here."""
    found = expand(shards)
    beside = None
    if embeddings is not None:
        beside = Artifact.open(embeddings)
        check_embeddings(beside, [shard.name for shard in found])
    open_sources(against, follow_links=True)  # refuses what holds no image to compare with
    reads = [*read_places(shards, found, () if beside is None else [beside]), *source_places(against)]
    for name in (HASHES, AGAINST, MARKED):
        refuse_overwriting(f"{out.rstrip('/')}/{name}", reads)
    count = workers if workers is not None else len(os.sched_getaffinity(0))
    shared = all(shard.is_shared for shard in found) and not any(url.startswith("memory:") for url in (out, *against))
    return DedupPlan(config, shards, found, tuple(against), beside, out.rstrip("/"), count if shared else 0, fresh)


def hash_images(made: DedupPlan, report: Callable[[Event], None], stop: threading.Event) -> tuple[Artifact, JobResult]:
    """The first pass over the shards; what is committed and unchanged is not done again."""
    source = input_artifact(made.pattern)
    semantic = {"input": source.fingerprint if source else None}
    run = {"shards": made.pattern, "shards_total": len(made.shards)}

    def todo(artifact: Artifact) -> list[InputShard]:
        committed = artifact.committed()
        for shard in made.shards:
            if shard.name in committed and shard.is_repaired(committed[shard.name]):
                artifact.retract(committed.pop(shard.name))
        return [shard for shard in made.shards if shard.name not in committed]

    artifact, tasks = _opened(f"{made.out}/{HASHES}", semantic, run, todo, made.fresh)
    return artifact, _hashed(artifact, tasks, dedup.hash_shard, made.workers, report, stop)


def hash_references(
    made: DedupPlan, report: Callable[[Event], None], stop: threading.Event
) -> tuple[Artifact, JobResult]:
    """The first pass over the reference sets. Raises BadInput where not one of their images can be decoded."""
    # Links lead where they may: of what is compared with, nothing but hashes is kept.
    tasks = list(cut(open_sources(made.against, follow_links=True), dedup.REFERENCES))
    run = {"sources": list(made.against), "shards_total": len(tasks)}
    artifact, todo = _opened(
        f"{made.out}/{AGAINST}", {}, run, lambda artifact: list(pending(tasks, artifact)), made.fresh
    )
    outcome = _hashed(artifact, todo, dedup.hash_references, made.workers, report, stop)
    rows = [record.rows for record in artifact.committed().values()]
    if len(rows) == len(tasks) and not any(each.get("ok") for each in rows):
        artifact.close()
        text = f"{', '.join(made.against)}: not one of {sum(sum(each.values()) for each in rows)} items can be decoded"
        raise BadInput(f"{text}; name a reference set of images")
    return artifact, outcome


def mark(
    made: DedupPlan,
    hashes: Artifact,
    against: Artifact | None,
    report: Callable[[Event], None],
    stop: threading.Event,
) -> tuple[Artifact, JobResult]:
    """The second pass: group all images and mark every row. Nothing is grouped where all marks are there already.

    Where images were added or read since, all are grouped again and every shard is marked anew.
    """
    names = [shard.name for shard in made.shards]
    references = sorted(against.committed()) if against is not None else []
    semantic = {
        "dedup": made.config.model_dump(mode="json"),
        "input": hashes.config["semantic"]["input"],
        "against": dedup.digest_of(against, references) if against is not None else None,
    }
    grouped = dedup.digest_of(hashes, names)  # of all that a mark depends on beside the configuration
    if made.embeddings is not None:
        semantic["embeddings"] = made.embeddings.fingerprint
        grouped += dedup.digest_of(made.embeddings, names)
    run = {"shards": made.pattern, "shards_total": len(names), "sources": list(made.against)}
    artifact = Artifact.create(f"{made.out}/{MARKED}", dedup.STAGE, semantic, run, fresh=made.fresh)
    try:
        old, records = artifact.committed(), hashes.committed()
        shards = join(made.shards, {"embeddings": made.embeddings} if made.embeddings is not None else {})
        for shard in shards:
            if shard.name in old:
                shard.has_repaired_companions(old[shard.name])  # raises where they are others
        if gone := sorted(set(old) - set(names)):
            text = f"{artifact.url}: holds marks of shard {gone[0]}, which --shards does not name"
            raise ArtifactMismatch(f"{text}; name all of them, or use --fresh to start over")
        done = {name: record for name, record in old.items() if record.input.get("grouped") == grouped}
        if len(done) == len(names):
            return artifact, JobResult()
        reference_set = read_hash_set(against, references) if against is not None else None
        hashed = read_hash_set(hashes, names)
        marks = dedup.find_marks(hashed, reference_set, made.config, _embedded(made, hashed, artifact))
        for shard in shards:
            name, by = shard.name, {"grouped": grouped, "companions": {c.name: c.sha256 for c in shard.companions}}
            if name not in done and not stop.is_set():
                record = dedup.mark_shard(name, records[name], marks, artifact, by, old.get(name))
                report(Pulse(rows=record.rows))
                report(ShardDone(record))
    except BaseException:
        artifact.close()
        raise
    return artifact, JobResult(interrupted=stop.is_set())


def _embedded(made: DedupPlan, hashed: HashSet, artifact: Artifact) -> tuple[Indices, Indices] | None:
    """Pairs of files that are copies by their embeddings; the artifact notes how many files have none."""
    if made.embeddings is None or made.config.cosine is None:
        return None
    left, right, skipped = near_embeddings(made.embeddings, hashed, made.config.cosine)
    artifact.note(embeddings=made.embeddings.url, embeddings_skipped=skipped)
    return left, right


def _opened(
    url: str,
    semantic: Mapping[str, object],
    run: Mapping[str, object],
    todo: Callable[[Artifact], list[Task]],
    fresh: bool,
) -> tuple[Artifact, list[Task]]:
    """The hashes' artifact and what it lacks. ``fresh`` starts over only where they are not of these images: another
    radius is no reason to look at all images again."""
    try:
        return _create(url, semantic, run, todo, fresh=False)
    except ArtifactMismatch:
        if not fresh:
            raise
    return _create(url, semantic, run, todo, fresh=True)


def _create(
    url: str,
    semantic: Mapping[str, object],
    run: Mapping[str, object],
    todo: Callable[[Artifact], list[Task]],
    *,
    fresh: bool,
) -> tuple[Artifact, list[Task]]:
    artifact = Artifact.create(url, dedup.HASH_STAGE, semantic, run, fresh=fresh)
    try:
        artifact.release_quarantine()
        return artifact, todo(artifact)
    except CapipeError:
        artifact.close()
        raise


def _hashed(
    artifact: Artifact,
    tasks: Iterable[Task],
    function: Callable[[Task, Artifact], ShardRecord],
    workers: int,
    report: Callable[[Event], None],
    stop: threading.Event,
) -> JobResult:
    outcome = JobResult()
    work = functools.partial(_written, function=function, artifact=artifact.attach())
    try:
        for result in run_pool(tasks, work, workers, stop):
            if isinstance(result, Done):
                report(Pulse(rows=result.result.rows))
                report(ShardDone(result.result))
            else:
                name = result.task.name if isinstance(result.task, InputShard) else result.task.shard
                artifact.quarantine(name, result.error)
                outcome.quarantined[name] = result.error
                report(ShardFailed(name, result.error))
    except BaseException:
        artifact.close()
        raise
    outcome.interrupted = stop.is_set()
    return outcome


def _written(task: Task, function: Callable[[Task, Artifact], ShardRecord], artifact: Artifact) -> ShardRecord:
    """As in ingest: a disk that is full ends the run, anything else is tried again."""
    try:
        return function(task, artifact)
    except OSError as error:
        if error.errno in HOPELESS:
            raise RunFailed(disk_text(error, artifact.url)) from error
        raise
