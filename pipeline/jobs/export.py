"""`capipe export`, put together: a finished artifact checked, then its shards over the pool."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...errors import ArtifactMismatch, BadInput, CapipeError, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.manifest import ShardRecord
from ...manifests.status import Status
from ...stages.export.card import CardWords
from ...stages.export.formats import writer_class
from ...stages.export.parquet import JSON, URL
from ...stages.export.plan import ExportTask, as_they_are, of_size
from ...stages.export.source import column_of, image_extensions
from ...stages.export.write import STAGE, ExportConfig, export_shards
from ..runners.messages import Event, Pulse, ShardDone, ShardFailed
from ..runners.pool import Done, run_pool
from ..runners.shard_queue import JobResult
from ..runners.worker import disk_text
from .export_files import extras, write_files

EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # what OpenCLIP looks for
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class ExportPlan:
    """An export before its first shard: the locked output and what of the source is still to do."""

    config: ExportConfig
    source: Artifact
    artifact: Artifact
    tasks: list[ExportTask]
    todo: list[ExportTask]
    workers: int
    link: bool

    @property
    def shards(self) -> int:
        """Shards that there are to be."""
        return sum(len(task.pieces) for task in self.tasks)

    @property
    def rows(self) -> int:
        return sum(record.count for task in self.tasks for record in task.sources)


def check_extension(name: str) -> None:
    """Raises BadInput for what no image can be called."""
    if name not in ("auto", "keep", *EXTENSIONS):
        raise BadInput(f"--image-extension {name}: use auto, keep, or one of {', '.join(EXTENSIONS)}")


def plan_export(
    url: str,
    out: str,
    format: str,
    words: CardWords,
    *,
    image_extension: str = "auto",
    shard_size: int | None = None,
    link: bool = False,
    workers: int | None = None,
    fresh: bool = False,
) -> ExportPlan:
    """Check the source, settle how images are called, lock the output. Raises CapipeError; then nothing was written.

    ``image_extension``: auto (one name for all where they differ), keep, or a name. ``shard_size``: most pairs of a
    shard; None for the source's own shards.
    """
    writer = writer_class(format, "--format")
    source = Artifact.open(url)
    shards = _complete(source)
    if shard_size is not None:
        _refuse_repeated_keys(source, shards, "--shard-size", pairs_only=False)
    elif format != "parquet":
        _refuse_repeated_keys(source, shards, format, pairs_only=True)
    extension = _extension(source, shards, image_extension) if format == "webdataset" else None
    config = ExportConfig(format=format, image_extension=extension, shard_size=shard_size)
    if link:
        _check_link(source, out, config)
    tasks = as_they_are(shards) if shard_size is None else of_size(source, shards, shard_size)
    run = {
        "shards": url,
        "shards_total": sum(len(task.pieces) for task in tasks),
        "input_manifest": source.manifest_digest(),
        "extras": extras(writer),
        "card": asdict(words),
    }
    semantic: dict[str, Any] = {"input": source.fingerprint, "export": config.model_dump(mode="json")}
    if format == "parquet":  # exports from before these columns are not gone on with: all files have the same
        semantic["columns"] = [URL, JSON]
    artifact = Artifact.create(out, STAGE, semantic, run, fresh=fresh, reads=[url])
    try:
        artifact.release_quarantine()
        todo = _todo(artifact, source, tasks)
    except CapipeError:
        artifact.close()
        raise
    count = workers if workers is not None else len(os.sched_getaffinity(0))
    shared = artifact.folder.is_shared and source.folder.is_shared
    return ExportPlan(config, source, artifact, tasks, todo, min(count, len(todo)) if shared else 0, link)


def _complete(source: Artifact) -> list[ShardRecord]:
    """All shards of a finished artifact of images."""
    records = list(source.committed().values())
    total = source.config["run"].get("shards_total")
    if total is None or len(records) != total:
        text = f"{source.url}: {len(records)} of {'?' if total is None else total} shards are committed"
        raise BadInput(f"{text}; run its stage ({source.stage}) to the end first")
    bare = next((r.shard for r in records if f"{r.shard}.tar" not in r.files), None)
    if bare is not None or not records:
        text = f"{source.url}: an artifact of stage {source.stage!r} without tars" + (
            f" (shard {bare})" if bare else ""
        )
        raise BadInput(f"{text}; export what `filter`, `annotate --pack` or `ingest` wrote")
    if not any(record.rows.get(Status.OK) for record in records):
        raise BadInput(f"{source.url}: no row of it is ok, so there is nothing to export; loosen what selected them")
    return records


def _refuse_repeated_keys(source: Artifact, shards: list[ShardRecord], what: str, *, pairs_only: bool) -> None:
    """Energon finds samples, and LLaVA's list names them, by key alone; shards put together are one. Remembers eight
    bytes a key. ``what`` needs them to be unique."""
    marks = [
        np.array([_mark(key) for key in column_of(source, record, "key", pairs_only=pairs_only)], np.uint64)
        for record in shards
    ]
    values, counts = np.unique(np.concatenate(marks), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    where: dict[str, str] = {}
    for record in shards if suspects else []:
        for key in column_of(source, record, "key", pairs_only=pairs_only):
            if _mark(key) not in suspects:
                continue
            if key in where:
                text = f"{source.url}: key {key!r} is in shard {where[key]} and in {record.shard}; {what} needs unique"
                raise BadInput(f"{text} keys: `capipe ingest` its tars first, or use --format parquet without it")
            where[key] = record.shard


def _mark(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _extension(source: Artifact, shards: list[ShardRecord], wish: str) -> str | None:
    """The name that all images get, or None where they keep theirs.

    Where they differ, `datasets` refuses the tars, or reads null for every image that is called otherwise than the
    first five, and says nothing. Readers decode by content, so one name does for all.
    """
    if wish == "keep":
        return None
    if wish != "auto":
        check_extension(wish)
        return wish
    found: set[str] = set()
    for record in shards:
        found |= image_extensions(source, record)
        if len(found) > 1:
            break
    return None if len(found) == 1 and found <= set(EXTENSIONS) else EXTENSIONS[0]


def _check_link(source: Artifact, out: str, config: ExportConfig) -> None:
    if config.format != "webdataset" or config.image_extension is not None or config.shard_size is not None:
        why = "tars are rewritten to name images alike" if config.image_extension else "tars are written anew"
        why = why if config.format == "webdataset" else "only webdataset has tars"
        raise BadInput(f"--link: {why}, so nothing can be linked; leave it out, or use --image-extension keep")
    if not source.folder.is_local or "://" in out:
        raise BadInput("--link: links are within one local file system; leave it out to copy")


def _todo(artifact: Artifact, source: Artifact, tasks: list[ExportTask]) -> list[ExportTask]:
    """What is not committed, of each task the pieces that are not."""
    committed = artifact.committed()
    todo = []
    for task in tasks:
        missing = []
        for piece in task.pieces:
            made = committed.pop(piece.shard, None)
            if made is None:
                missing.append(piece)
            elif _without_urls(made.input) != _without_urls(task.made_of(source, piece)):
                shards = ", ".join(record.shard for record in task.sources)
                raise _changed(artifact, f"shard {shards} of {source.url} changed")
        if missing:
            todo.append(replace(task, pieces=tuple(missing)))
    if committed:
        raise _changed(artifact, f"{source.url} has no shard {min(committed)} any more")
    return todo


def _without_urls(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Where the source lies may change."""
    parts = [{**part, "url": ""} for part in made_of.get("shards", ())]
    return {**made_of, "url": "", "shards": parts}


def _changed(artifact: Artifact, what: str) -> ArtifactMismatch:
    text = f"{artifact.url}: {what} since this export was made"
    return ArtifactMismatch(f"{text}; use another --out, or --fresh to start over")


def execute_export(made: ExportPlan, report: Callable[[Event], None], stop: threading.Event) -> JobResult:
    """Export what is not committed yet; shards that cannot be done are quarantined. Ends early once ``stop`` is set."""
    outcome = JobResult()
    function = functools.partial(
        _write_shard, source=made.source, artifact=made.artifact.attach(), config=made.config, link=made.link
    )
    for result in run_pool(made.todo, function, made.workers, stop):
        if isinstance(result, Done):
            for record in result.result:
                report(Pulse(rows=record.rows))
                report(ShardDone(record))
        else:
            made.artifact.quarantine(result.task.shard, result.error)
            outcome.quarantined[result.task.shard] = result.error
            report(ShardFailed(result.task.shard, result.error))
    outcome.interrupted = stop.is_set()
    return outcome


def _write_shard(
    task: ExportTask, source: Artifact, artifact: Artifact, config: ExportConfig, link: bool
) -> list[ShardRecord]:
    """A full disk ends the run: neither a retry nor another shard would mend it. The rest is tried again."""
    try:
        return export_shards(task, source, artifact, config, link=link)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise BadInput("--link: the shards and --out are on different file systems; leave it out to copy") from None
        if error.errno in _HOPELESS:
            raise RunFailed(disk_text(error, artifact.url)) from error
        raise


def finish(made: ExportPlan, words: CardWords) -> list[str] | None:
    """Once every shard is there, write the files over all of them; returns what readers should know, else None."""
    if len(made.artifact.committed()) < made.shards:
        return None
    said = list(_notes(made.artifact, made.config))
    write_files(made.artifact, made.source, words, made.config.format, said)
    return said


def _notes(artifact: Artifact, config: ExportConfig) -> Iterator[str]:
    """What a reader of the export should know, a sentence each; they are in the card, too."""
    sums: Counter[str] = Counter()
    for record in artifact.committed().values():
        sums.update({name: n for name, n in record.stats.items() if isinstance(n, int)})
    if config.image_extension is not None:
        yield f"All images are called .{config.image_extension}, whatever their format: readers go by content."
    if sums["without_caption"]:
        yield f"{sums['without_caption']:,} pairs with an empty caption are left out: there is nothing to answer."
    if sums["image_marks"]:
        yield f"<image> in {sums['image_marks']:,} captions is written [image]: trainers would look for another image."
    if sums["empty_captions"]:
        yield f"{sums['empty_captions']:,} pairs have an empty caption, and an empty text file."
    if sums["several_lines"]:
        yield f"{sums['several_lines']:,} captions have several lines, of which some trainers read the first alone."
