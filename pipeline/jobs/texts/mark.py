"""Job of `capipe dedup` for texts: reads every shard's texts (in parallel), then groups all of them (in one step).

Two artifacts in the output folder: ``texts``, and ``marked``, which has the rows and columns of marks by images and
those of marks by texts. Each is resumed independently.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ....errors import ArtifactMismatch, BadInput
from ....manifests.artifact import Artifact
from ....manifests.files.overwriting import refuse_overwriting
from ....manifests.manifest import ShardRecord
from ....manifests.shards import InputShard, expand, input_artifact, join, read_places
from ....stages.dedup.marks import STAGE, digest_of
from ....stages.dedup.texts.bands import SLOTS, require_rensa
from ....stages.dedup.texts.leaders import PER_BAND
from ....stages.dedup.texts.marks import TextConfig, TextMarks, find_leaders, mark_texts
from ....stages.dedup.texts.reading import CAPTIONS, read_texts
from ....stages.dedup.texts.reading import STAGE as TEXT_STAGE
from ....stages.dedup.texts.shingles import DENSE_LETTERS, LETTERS, MOST_CHARACTERS
from ....stages.dedup.texts.text_set import read_text_set
from ...runners.messages import Event
from ...runners.placement import TaskPlacement, task_placement
from ...runners.pool_job import local_paths, refuse_taking_back, run_pool_job
from ...runners.ray.cluster import RayCluster
from ...runners.shard_queue import JobResult
from ..dedup import MARKED, open_first_pass

TEXTS = "texts"


@dataclass(frozen=True)
class TextPlan:
    """A run over texts before its first row. ``captions``: an annotate artifact; None for the shards' own texts.

    ``marks``: marks by images of an earlier run; None if this one makes them."""

    config: TextConfig
    pattern: str
    shards: list[InputShard]
    captions: Artifact | None
    marks: Artifact | None
    out: str
    placement: TaskPlacement
    fresh: bool
    share: bool


def plan_texts(
    shards: str,
    out: str,
    config: TextConfig,
    *,
    captions: str | None = None,
    marks: str | None = None,
    workers: int | None = None,
    fresh: bool = False,
    share: bool = False,
    cluster: RayCluster | None = None,
) -> TextPlan:
    """Check shards, captions and marks. Raises BadInput; nothing is written."""
    inputs = expand(shards)
    written = None if captions is None else _opened(captions, "annotate", "--captions")
    marked = None if marks is None else _opened(marks, STAGE, "--marks")
    if marked is not None:
        join(inputs, {"marks": marked})  # raises if marks of a shard are missing
    if written is not None:
        inputs = join(inputs, {CAPTIONS: written})
    reads = read_places(shards, inputs, [artifact for artifact in (written, marked) if artifact is not None])
    for name in (TEXTS, MARKED):
        refuse_overwriting(f"{out.rstrip('/')}/{name}", reads)
    shared = all(shard.is_shared for shard in inputs) and not out.startswith("memory:")
    placement = task_placement(workers, shared, cluster)
    return TextPlan(config, shards, inputs, written, marked, out.rstrip("/"), placement, fresh, share)


def _opened(url: str, stage: str, option: str) -> Artifact:
    """An artifact of a stage. Raises BadInput for another one."""
    artifact = Artifact.open(url)
    if artifact.stage != stage:
        raise BadInput(f"{url}: an artifact of stage {artifact.stage!r}; {option} takes one of `capipe {stage}`")
    return artifact


def read(plan: TextPlan, report: Callable[[Event], None], stop: threading.Event) -> tuple[Artifact, JobResult]:
    """First pass; committed, unchanged shards are skipped."""
    source = input_artifact(plan.pattern)
    semantic = {
        "input": source.fingerprint if source else None,
        "captions": plan.captions.fingerprint if plan.captions else None,
        "shingles": [LETTERS, DENSE_LETTERS, MOST_CHARACTERS],
        "minhash": {"slots": SLOTS, "rensa": require_rensa().RMinHash.ALGORITHM_VERSION},
    }
    run = {"shards": plan.pattern, "shards_total": len(plan.shards)}
    if plan.captions is not None:
        run["captions"] = plan.captions.url

    def todo(artifact: Artifact) -> list[InputShard]:
        committed = artifact.committed()
        for shard in plan.shards:
            record = committed.get(shard.name)
            if record is None:
                continue
            if shard.has_repaired_companions(record) if shard.companions else shard.is_repaired(record):
                refuse_taking_back(artifact, f"{shard.url}: some of its rows were done again since")
                artifact.retract(committed.pop(shard.name))
        return [shard for shard in plan.shards if shard.name not in committed]

    artifact, tasks = open_first_pass(f"{plan.out}/{TEXTS}", semantic, run, todo, plan.fresh, plan.share, TEXT_STAGE)
    try:
        reads = local_paths([shard.url for shard in plan.shards[:1]])
        result = run_pool_job(
            *(tasks, read_texts, artifact, plan.placement, report, stop), shard_name=lambda task: task.name, reads=reads
        )
    except BaseException:
        artifact.close()
        raise
    return artifact, result


def mark(
    plan: TextPlan, texts: Artifact, marks: Artifact, report: Callable[[Event], None], stop: threading.Event
) -> tuple[Artifact, JobResult]:
    """Second pass: group the texts of all rows that are ok in ``marks`` and mark every row; skipped if all marks are
    committed. If rows were added or read since, all are grouped again and every shard is marked again."""
    names = [shard.name for shard in plan.shards]
    semantic = {
        "texts": plan.config.model_dump(mode="json"),
        "read": texts.fingerprint,
        "marks": marks.fingerprint,
        "input": marks.config["semantic"].get("input"),
    }
    run = {"shards": plan.pattern, "shards_total": len(names), "texts": texts.url, "marks": marks.url}
    grouped = digest_of(texts, names) + digest_of(marks, names)  # of everything that marks depend on
    artifact = Artifact.create(f"{plan.out}/{MARKED}", STAGE, semantic, run, fresh=plan.fresh, share=plan.share)
    try:
        committed, records = artifact.committed(), marks.committed()
        if removed := sorted(set(committed) - set(names)):
            text = f"{artifact.url}: holds marks of shard {removed[0]}, which --shards does not name"
            raise ArtifactMismatch(f"{text}; name all of them, or use --fresh to start over")
        done = {name for name, record in committed.items() if record.input.get("grouped") == grouped}
        if len(done) == len(names):
            return artifact, JobResult()
        if len(done) < len(committed):
            refuse_taking_back(artifact, f"{texts.url}: texts were added or read again since")
        text_set = read_text_set(texts, marks, names)
        leaders = find_leaders(text_set, plan.config.text_threshold, stop.is_set)
        if leaders is None:
            return artifact, JobResult(interrupted=True)
        artifact.note(texts_distinct=len(text_set), texts_crowded=leaders.crowded)
        found = TextMarks.of(text_set, leaders, marks, plan.config)

        def write(number: int, artifact: Artifact) -> ShardRecord:
            name = names[number]
            return mark_texts(number, records[name], marks, found, artifact, {"grouped": grouped}, committed.get(name))

        todo = [number for number, name in enumerate(names) if name not in done]
        where = plan.placement.here()
        job = run_pool_job(todo, write, artifact, where, report, stop, shard_name=lambda number: names[number])
    except BaseException:
        artifact.close()
        raise
    return artifact, job


def warning(artifact: Artifact) -> str | None:
    """A line about texts that were not compared with all that they may resemble."""
    if not (crowded := artifact.config["run"].get("texts_crowded")):
        return None
    text = f"{crowded:,} texts agree in part with more than {PER_BAND} different ones, and were compared with the first"
    return f"{text} {PER_BAND} of them; a higher --text-threshold finds them apart"
