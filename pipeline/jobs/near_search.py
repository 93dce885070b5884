"""The search for near images as pool jobs: tables, then signatures, then confirmation, with results in a working
artifact inside the marks, which is removed when all marks are written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ArtifactMismatch, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.files.storage import PRIVATE
from ...stages.dedup.marks import Pairs
from ...stages.dedup.near.work import STAGE, NearSearch, Step
from ..runners.messages import Event, Note, ShardDone, ShardFailed
from ..runners.placement import TaskPlacement
from ..runners.pool_job import run_pool_job

_FOLDER = f"{PRIVATE}/{STAGE}"
_WORTH_PROCESSES = 5.0  # seconds of work: they take some seconds to start
_NOTE_SECONDS = 10.0


def open_work(marks: Artifact, search: NearSearch, made_from: Mapping[str, Any]) -> Artifact:
    """The working artifact: that of a killed run, or a new one if images or options are others now."""
    url, semantic = f"{marks.url}/{_FOLDER}", {**made_from, **search.config}
    try:
        work = Artifact.create(url, STAGE, semantic, {}, share=marks.shared)
    except ArtifactMismatch:
        if marks.shared:
            raise
        work = Artifact.create(url, STAGE, semantic, {}, fresh=True)
    if not work.shared:
        work.release_quarantine()
    return work


def remove_work(marks: Artifact, work: Artifact) -> None:
    """Close and remove the working artifact, unless another process that shares the folder still reads it."""
    if work.close():
        marks.folder.remove(_FOLDER)


def run_search(
    search: NearSearch, work: Artifact, placement: TaskPlacement, report: Callable[[Event], None], stop: threading.Event
) -> Pairs | None:
    """The pairs that the search found, None if it was stopped. Raises RunFailed if a task keeps failing."""
    for step in search.steps(work):
        where = placement if step.seconds > _WORTH_PROCESSES else placement.here()
        result = run_pool_job(
            step.todo, step.write, work, where, _noted(step, report), stop, shard_name=lambda task: str(task.name)
        )
        if result.quarantined:
            name, error = next(iter(result.quarantined.items()))
            raise RunFailed(f"{work.url}: {name} failed: {error}; run the same command to try it again")
        if result.interrupted:
            return None
    return search.result(work)


def _noted(step: Step, report: Callable[[Event], None]) -> Callable[[Event], None]:
    """Events of tasks as notes: tasks are no shards of the marks."""
    done, last = step.total - len(step.todo), time.monotonic()

    def note(event: Event) -> None:
        nonlocal done, last
        if isinstance(event, ShardFailed):
            report(event)
        if isinstance(event, ShardDone):
            done += 1
            if time.monotonic() - last > _NOTE_SECONDS:
                last = time.monotonic()
                report(Note(f"{done} of {step.total} {step.name}"))

    return note
