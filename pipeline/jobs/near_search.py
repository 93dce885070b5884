"""The searches for near images as pool jobs, step by step, with results in working artifacts.

That for near hashes (tables, then signatures, then confirmation) is inside the marks, and removed when all marks are
written. That for near embeddings (parts, centroids, cells) is inside the hashes, where also what it found is kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ...errors import ArtifactMismatch, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.files.locks import LockHeld, Patience
from ...manifests.files.storage import PRIVATE
from ...manifests.sharing.claims import alone
from ...stages.dedup.embeddings.work import STAGE as EMBEDDINGS
from ...stages.dedup.embeddings.work import EmbeddingSearch, NearFiles, read_found, write_found
from ...stages.dedup.marks import Pairs
from ...stages.dedup.near.work import STAGE, NearSearch
from ...stages.dedup.steps import Step
from ..runners.messages import DoneElsewhere, Event, Note, ShardDone, ShardFailed, ShardLost, WorkerFailed
from ..runners.placement import TaskPlacement
from ..runners.pool_job import run_pool_job

_FOLDER = f"{PRIVATE}/{STAGE}"
_WORTH_PROCESSES = 5.0  # seconds of work: they take some seconds to start
_NOTE_SECONDS = 10.0


def open_work(marks: Artifact, search: NearSearch, made_from: Mapping[str, Any]) -> Artifact:
    """The working artifact: that of a killed run, or a new one if images or options are others now."""
    return resumed(f"{marks.url}/{_FOLDER}", STAGE, {**made_from, **search.config}, marks.shared)


def resumed(url: str, stage: str, semantic: Mapping[str, Any], share: bool) -> Artifact:
    """An artifact of intermediate results, for writing: the existing one, or a new one if that was made of others."""
    try:
        artifact = Artifact.create(url, stage, semantic, {}, share=share)
    except ArtifactMismatch:
        if share:
            raise
        artifact = Artifact.create(url, stage, semantic, {}, fresh=True)
    if not share:
        artifact.release_quarantine()
    return artifact


def remove_work(marks: Artifact, work: Artifact) -> None:
    """Close and remove the working artifact, unless another process that shares the folder still reads it."""
    if work.close():
        marks.folder.remove(_FOLDER)


def run_search(
    search: NearSearch, work: Artifact, placement: TaskPlacement, report: Callable[[Event], None], stop: threading.Event
) -> Pairs | None:
    """The pairs that the search found, None if it was stopped. Raises RunFailed if a task keeps failing."""
    return search.result(work) if run_steps(search.steps(work), work, placement, report, stop) else None


def run_steps(
    steps: Iterable[Step],
    work: Artifact,
    placement: TaskPlacement,
    report: Callable[[Event], None],
    stop: threading.Event,
) -> bool:
    """Run the tasks of one step after another; False if it was stopped. Raises RunFailed if a task keeps failing."""
    patience = Patience(stopped=stop.is_set, say=lambda line: report(Note(line)))
    for step in _one_by_one(steps, work, patience):
        if step is None:
            return False
        where = placement.at_most(step.processes) if step.seconds > _WORTH_PROCESSES else placement.here()
        result = run_pool_job(
            step.todo, step.write, work, where, _noted(step, report), stop, shard_name=lambda task: str(task.name)
        )
        if result.quarantined:
            name, error = next(iter(result.quarantined.items()))
            raise RunFailed(f"{work.url}: {name} failed: {error}; run the same command to try it again")
        if result.interrupted:
            return False
    return True


def _one_by_one(steps: Iterable[Step], work: Artifact, patience: Patience) -> Iterator[Step | None]:
    """The steps. What is done between them, in this process, one of those that share the folder does at a time; None:
    a stop was requested while another one did it."""
    left = iter(steps)
    while True:
        try:
            with alone(work.claims, "between-steps", patience):
                step = next(left, None)
        except LockHeld:
            yield None
            return
        if step is None:
            return
        yield step


def near_files(
    search: EmbeddingSearch,
    hashes: Artifact,
    files: int,
    made_from: Mapping[str, Any],
    placement: TaskPlacement,
    report: Callable[[Event], None],
    stop: threading.Event,
) -> NearFiles | None:
    """The files that are near by their embeddings, None if it was stopped. What was found before at this threshold, or
    at a lower one, is not searched for again. Raises RunFailed if a task keeps failing."""
    url = f"{hashes.url}/{PRIVATE}/{EMBEDDINGS}"
    semantic = {**made_from, **search.config}
    if (kept := _kept(url, semantic, files, hashes.shared)) is not None:
        return kept
    work = resumed(f"{url}-work", EMBEDDINGS, semantic, hashes.shared)
    try:
        if not run_steps(search.steps(work), work, placement, report, stop):
            return None
        found = search.result(work)
        artifact = resumed(url, EMBEDDINGS, semantic, hashes.shared)
        with alone(artifact.claims, EMBEDDINGS):
            write_found(found, artifact)
        artifact.close()
        if work.close():  # no other process that shares the folder still reads it
            hashes.folder.remove(f"{PRIVATE}/{EMBEDDINGS}-work")
    finally:
        work.close()
    return found


def _kept(url: str, semantic: Mapping[str, Any], files: int, share: bool) -> NearFiles | None:
    """What an earlier search found at this threshold or a lower one, if it depends on the same otherwise."""
    try:
        before = Artifact.open(url).config["semantic"].get("cosine") if Artifact.exists(url) else None
        if not isinstance(before, float) or before > semantic["cosine"]:
            return None
        artifact = Artifact.create(url, EMBEDDINGS, {**semantic, "cosine": before}, {}, share=share)
    except ArtifactMismatch:
        return None
    found = read_found(artifact, files)
    artifact.close()
    return None if found is None else found.reaching(semantic["cosine"])


def _noted(step: Step, report: Callable[[Event], None]) -> Callable[[Event], None]:
    """Events of tasks as notes: tasks are no shards of the marks."""
    done, last = step.total - len(step.todo), time.monotonic()

    def note(event: Event) -> None:
        nonlocal done, last
        if isinstance(event, ShardFailed | ShardLost | WorkerFailed | Note):
            report(event)
        if isinstance(event, ShardDone | DoneElsewhere):
            done += 1
            if time.monotonic() - last > _NOTE_SECONDS:
                last = time.monotonic()
                report(Note(f"{done} of {step.total} {step.name}"))

    return note
