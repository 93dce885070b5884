"""Job of `capipe export`: checks a finished artifact, then writes its shards in the worker pool."""

from __future__ import annotations

import errno
import functools
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...errors import ArtifactMismatch, BadInput, CapipeError
from ...manifests.artifact import Artifact
from ...manifests.joining.index_tars import is_index
from ...manifests.manifest import ShardRecord
from ...manifests.sharing.claims import alone
from ...manifests.status import Status
from ...manifests.withdrawal.applied import Withdrawal, apply, has_withdrawn
from ...manifests.withdrawal.uid_set import UidSet
from ...models.images.encoding import Codec
from ...stages import last_files
from ...stages.export.card import CardWords
from ...stages.export.formats import writer_class
from ...stages.export.lance.schema import FORMAT as LANCE
from ...stages.export.lance.schema import STORAGE
from ...stages.export.lance.version import NOTE as TABLE_VERSION
from ...stages.export.lance.version import refuse_foreign
from ...stages.export.parquet import JSON, URL
from ...stages.export.plan import ExportTask, as_before, as_they_are, of_size
from ...stages.export.source import column_of
from ...stages.export.write import ANEW, STAGE, ExportConfig, export_shards
from ..runners.messages import Event
from ..runners.placement import TaskPlacement, task_placement
from ..runners.pool_job import local_paths, run_pool_job
from ..runners.ray.cluster import RayCluster
from ..runners.shard_queue import JobResult
from .export_captions import Appending, execute_appending, listing_schema, open_sets, require, settle
from .export_files import extras, write_files
from .export_images import check_formats, chosen_extension

CHECKED = "checked"  # key of the facts about a run: the options and the source of which keys and extensions are known


@dataclass(frozen=True)
class ExportPlan:
    """An export before its first shard: the locked output and the tasks left to do."""

    config: ExportConfig
    source: Artifact
    artifact: Artifact
    tasks: list[ExportTask]
    todo: list[ExportTask]
    placement: TaskPlacement
    link: bool
    images: tuple[str, ...]
    withdrawal: Withdrawal
    appending: Appending

    @property
    def shards(self) -> int:
        """Number of shards of the finished export."""
        return sum(len(task.pieces) for task in self.tasks)

    @property
    def rows(self) -> int:
        return sum(record.count for task in self.tasks for record in task.sources)


def plan_export(
    url: str,
    out: str,
    format: str,
    words: CardWords,
    *,
    image_extension: str = "auto",
    shard_size: int | None = None,
    transcode: Codec | None = None,
    quality: int | None = None,
    link: bool = False,
    images: Sequence[str] = (),
    drop: UidSet | None = None,
    captions: Sequence[str] = (),
    workers: int | None = None,
    fresh: bool = False,
    share: bool = False,
    cluster: RayCluster | None = None,
) -> ExportPlan:
    """Check the source, choose the images' extension, lock the output. Raises CapipeError; then nothing was written.

    ``image_extension``: auto (a single one if they differ), keep, or an extension. ``shard_size``: maximum number of
    pairs per shard; None for the source's own shards. ``transcode``: how images are encoded anew that readers of the
    format do not decode; None refuses them. ``images``: folders and URLs below which an index's tars may be
    read. ``drop``: withdrawn images; on an existing export only shards with images that are newly listed, here or in
    the source, are written again. ``captions``: artifacts of captions whose columns a Lance table is to get.
    """
    writer = writer_class(format, "--format")
    writer.check()
    source = Artifact.open(url)
    shards = _complete(source)
    sets = open_sets(captions, format, source, shards)
    digest, standing = source.manifest_digest(), None if fresh else _before(out, source)
    asked = {"format": format, "shard_size": shard_size, "image_extension": image_extension, "of": digest}
    asked |= {} if transcode is None else {"transcode": transcode, "quality": quality}
    checked = standing is not None and standing.config["run"].get(CHECKED) == asked  # its rows are not read again
    if checked:
        pass
    elif shard_size is not None:
        _refuse_repeated_keys(source, shards, "--shard-size", pairs_only=False)
    elif format not in ("parquet", LANCE):
        _refuse_repeated_keys(source, shards, format, pairs_only=True)
    if not checked and transcode is None:
        check_formats(source, shards, writer, images)
    before = None if drop is None and not has_withdrawn(source) else standing
    extension = None
    if format == "webdataset" and image_extension == "auto" and standing is not None and (checked or before):
        extension = standing.setting("semantic", "export", kind=dict).get("image_extension")
    elif format == "webdataset":
        extension = chosen_extension(source, shards, image_extension, images, transcode)
    config = ExportConfig(
        format=format, image_extension=extension, shard_size=shard_size, transcode=transcode, quality=quality
    )
    if link:
        _check_link(source, out, config)
    tasks = _tasks(source, shards, shard_size, before)
    run = {
        "shards": url,
        "shards_total": sum(len(task.pieces) for task in tasks),
        "input_manifest": digest,
        CHECKED: asked,
        "extras": extras(writer),
        "card": asdict(words),
    }
    semantic: dict[str, Any] = {"input": source.fingerprint, "export": config.model_dump(mode="json")}
    if format == LANCE:
        semantic["storage"] = STORAGE
    if format == "parquet":  # exports older than these columns are not resumed: all files must have the same columns
        semantic["columns"] = [URL, JSON]
    reads = [url, *(entry.artifact.url for entry in sets)]
    artifact = Artifact.create(out, STAGE, semantic, run, fresh=fresh, share=share, reads=reads)
    try:
        if format == LANCE:
            refuse_foreign(artifact.folder, artifact.config["run"].get(TABLE_VERSION))
            if drop is not None:
                require(artifact, sets)
        withdrawal = apply(artifact, drop)
        if not share:
            artifact.release_quarantine()
        todo = _todo(artifact, source, tasks, withdrawal.touched)
        appending = Appending()
        if format == LANCE:
            appending = settle(artifact, sets, listing_schema(source, shards[0], config), writes=bool(todo))
        if todo or appending.todo(artifact):
            last_files.outdate(artifact)
    except CapipeError:
        artifact.close()
        raise
    shared = artifact.folder.is_shared and source.folder.is_shared
    placement = task_placement(workers, shared, cluster)
    return ExportPlan(config, source, artifact, tasks, todo, placement, link, tuple(images), withdrawal, appending)


def _before(out: str, source: Artifact) -> Artifact | None:
    """The export in ``out``, if it was made of ``source``."""
    artifact = Artifact.open(out) if Artifact.exists(out) else None
    made_of_it = artifact is not None and artifact.config["semantic"].get("input") == source.fingerprint
    return artifact if made_of_it and artifact is not None and artifact.stage == STAGE else None


def _tasks(
    source: Artifact, shards: list[ShardRecord], shard_size: int | None, before: Artifact | None
) -> list[ExportTask]:
    """The tasks of an export, with the bounds of shards made ``before``, if all of them are there."""
    if shard_size is None:
        return as_they_are(shards)
    kept = None if before is None else as_before(shards, list(before.committed().values()))
    return kept or of_size(source, shards, shard_size)


def _complete(source: Artifact) -> list[ShardRecord]:
    """All shards of a finished artifact of images."""
    records = list(source.committed().values())
    total = source.config["run"].get("shards_total")
    if total is None or len(records) != total:
        text = f"{source.url}: {len(records)} of {'?' if total is None else total} shards are committed"
        raise BadInput(f"{text}; run its stage ({source.stage}) to the end first")
    tarless = next((r.shard for r in records if f"{r.shard}.tar" not in r.files), None)
    if (tarless is not None and not is_index(source)) or not records:
        text = f"{source.url}: an artifact of stage {source.stage!r} without tars" + (
            f" (shard {tarless})" if tarless else ""
        )
        raise BadInput(f"{text}; export what `filter`, `annotate --pack` or `ingest` wrote")
    if not any(record.rows.get(Status.OK) for record in records):
        raise BadInput(f"{source.url}: no row of it is ok, so there is nothing to export; loosen what selected them")
    return records


def _refuse_repeated_keys(source: Artifact, shards: list[ShardRecord], what: str, *, pairs_only: bool) -> None:
    """Refuse duplicate keys: Energon and LLaVA find samples by key alone, and so does a merged shard.

    Uses eight bytes of memory per key. ``what``: the option that needs unique keys.
    """
    hashes = [
        np.array([_hash(key) for key in column_of(source, record, "key", pairs_only=pairs_only)], np.uint64)
        for record in shards
    ]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    where: dict[str, str] = {}
    for record in shards if suspects else []:
        for key in column_of(source, record, "key", pairs_only=pairs_only):
            if _hash(key) not in suspects:
                continue
            if key in where:
                text = f"{source.url}: key {key!r} is in shard {where[key]} and in {record.shard}; {what} needs unique"
                raise BadInput(f"{text} keys: `capipe ingest` its tars first, or use --format parquet without it")
            where[key] = record.shard


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _rewrites(config: ExportConfig) -> bool:
    return config.shard_size is not None or config.transcode is not None


def _check_link(source: Artifact, out: str, config: ExportConfig) -> None:
    if config.format != "webdataset" or config.image_extension is not None or _rewrites(config):
        why = "tars are rewritten to name images alike" if config.image_extension else "tars are written anew"
        why = why if config.format == "webdataset" else "only webdataset has tars"
        raise BadInput(f"--link: {why}, so nothing can be linked; leave it out, or use --image-extension keep")
    if is_index(source):
        raise BadInput(f"--link: {source.url} is an index, which has no tars to link; leave it out to copy")
    if not source.folder.is_local or "://" in out:
        raise BadInput("--link: links are within one local file system; leave it out to copy")


def _todo(artifact: Artifact, source: Artifact, tasks: list[ExportTask], touched: Collection[str]) -> list[ExportTask]:
    """Tasks with pieces to write, reduced to these: uncommitted ones, those of rows that were redone or withdrawn in
    the source since, and those that a longer list touched."""
    committed = artifact.committed()
    todo = []
    for task in tasks:
        missing = []
        for piece in task.pieces:
            record = committed.pop(piece.shard, None)
            if record is None:
                missing.append(piece)
                continue
            made_of_now = task.made_of(source, piece)
            changed = _without_urls(record.input) != _without_urls(made_of_now)
            if changed and not _is_repaired(record.input, made_of_now, task.sources):
                shards = ", ".join(source_record.shard for source_record in task.sources)
                raise _changed(artifact, f"shard {shards} of {source.url} changed")
            if changed or piece.shard in touched:
                missing.append(replace(piece, over=record))
        if missing:
            todo.append(replace(task, pieces=tuple(missing)))
    if committed:
        raise _changed(artifact, f"{source.url} has no shard {min(committed)} any more")
    return todo


def _is_repaired(old: Mapping[str, Any], new: Mapping[str, Any], sources: Sequence[ShardRecord]) -> bool:
    """True if a piece is of the same rows as before, of source shards of which some rows were redone since."""
    olds, news = (entry.get("shards") or [{**entry, "name": sources[0].shard}] for entry in (old, new))
    versions = {record.shard: {*record.versions} for record in sources}
    same = [[part.get(key) for key in ("name", "from", "to")] for part in olds] == [
        [part.get(key) for key in ("name", "from", "to")] for part in news
    ]
    return same and all({part["digest"], part["rows"]} <= versions[part["name"]] for part in olds)


def _without_urls(input_info: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's input without its locations: a source may be moved."""
    parts = [{**part, "url": ""} for part in input_info.get("shards", ())]
    return {**input_info, "url": "", "shards": parts}


def _changed(artifact: Artifact, what: str) -> ArtifactMismatch:
    text = f"{artifact.url}: {what} since this export was made"
    return ArtifactMismatch(f"{text}; use another --out, or --fresh to start over")


def execute_export(plan: ExportPlan, report: Callable[[Event], None], stop: threading.Event) -> JobResult:
    """Export uncommitted shards, then append captions. Returns when all are done or quarantined, or ``stop`` is set."""
    write = functools.partial(_write_shards, source=plan.source, config=plan.config, link=plan.link, images=plan.images)
    result = run_pool_job(
        *(plan.todo, write, plan.artifact, plan.placement.at_most(len(plan.todo)), report, stop),
        shard_name=lambda task: task.shard,
        shards=lambda task: [piece.shard for piece in task.pieces],
        over=lambda task: [piece.over for piece in task.pieces],
        reads=local_paths([plan.source.url, *plan.images]),
    )
    if not result.interrupted and plan.appending.sets:
        more = execute_appending(plan.appending, plan.artifact, plan.placement, report, stop)
        result = JobResult({**result.quarantined, **more.quarantined}, more.interrupted)
    return result


def _write_shards(
    task: ExportTask, source: Artifact, config: ExportConfig, link: bool, images: Sequence[str], artifact: Artifact
) -> list[ShardRecord]:
    try:
        return export_shards(task, source, artifact, config, link=link, images=images)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise BadInput("--link: the shards and --out are on different file systems; leave it out to copy") from None
        raise


def finish(plan: ExportPlan, words: CardWords) -> list[str] | None:
    """Once every shard is committed, write the files over all shards; returns notes for users, else None."""
    if len(plan.artifact.committed()) < plan.shards or plan.appending.todo(plan.artifact):
        return None
    notes = list(_notes(plan.artifact, plan.config))
    with alone(plan.artifact.claims, "extras"):
        write_files(plan.artifact, plan.source, words, plan.config.format, notes)
    plan.withdrawal.conclude()
    return notes


def _notes(artifact: Artifact, config: ExportConfig) -> Iterator[str]:
    """Notes for users of the export, one sentence each; they are also on the card."""
    sums: Counter[str] = Counter()
    withdrawn = sum(record.rows.get(Status.WITHDRAWN, 0) for record in artifact.committed().values())
    if withdrawn:
        yield f"{withdrawn:,} rows are withdrawn: of these images the uid alone is left."
    for record in artifact.committed().values():
        sums.update({name: n for name, n in record.stats.items() if isinstance(n, int)})
    if config.image_extension is not None:
        yield f"All images are called .{config.image_extension}, whatever their format: readers go by content."
    if sums[ANEW]:
        text = f"{sums[ANEW]:,} images in formats that not all readers decode are encoded anew, as {config.transcode}"
        yield f"{text}: their uid is that of the new bytes, `source_uid` and `original_sha256` are of the old ones."
    if sums["without_caption"]:
        yield f"{sums['without_caption']:,} pairs with an empty caption are left out: there is nothing to answer."
    if sums["image_marks"]:
        yield f"<image> in {sums['image_marks']:,} captions is written [image]: trainers would look for another image."
    if sums["empty_captions"]:
        yield f"{sums['empty_captions']:,} pairs have an empty caption, and an empty text file."
    if sums["several_lines"]:
        yield f"{sums['several_lines']:,} captions have several lines, of which some trainers read the first alone."
