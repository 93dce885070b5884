"""Ingest of items from any source into image shards. One task is one output shard, written by one process.

Every item becomes exactly one row. Valid images are copied unchanged into the tar with their text and metadata (with
``transcode``, those of further formats are encoded anew); items that are not valid are only in the Parquet, with their
error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any

import pyarrow as pa
from pydantic import ConfigDict, Field, field_validator, model_validator

from ...errors import BadInput, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.configuration import Growing
from ...manifests.files.outside import Reach
from ...manifests.manifest import ShardRecord
from ...manifests.schema import INGEST, TRANSCODED
from ...manifests.sidecars import encode_meta
from ...manifests.status import Status
from ...models.images.decode import MAX_GRID_ASPECT, ImageInfo, ImageLimits
from ...models.images.encoding import DEFAULT_QUALITY, Codec, Encoding
from ...models.images.formats import ImageProblem
from ..reading.columns import Columns
from ..reading.faults import read_problem
from .accept import ACCEPTED, advice
from .growth import grown, items_file, marks_of
from .image_check import ImageCheck
from .retry import ItemRow, repaired_rows
from .source_refs import Handles, Item, ItemRef

STAGE = "ingest"


class IngestConfig(Growing):
    """Options that determine the rows of an ingest; all of them are in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later = (
        *("accept", "transcode", "quality", "text_column", "image_folder"),
        *("image_key", "within", "public_only", "follow_links"),
    )

    shard_size: int = Field(10_000, ge=1, le=1_000_000, description="items per shard, usable or not")
    accept: tuple[str, ...] = Field((), description="formats taken besides JPEG, PNG and WebP")
    transcode: Codec | None = Field(None, description="how these are encoded anew; null: their bytes are kept")
    quality: int | None = Field(None, ge=1, le=100, description="of jpeg and webp; null: 95")
    min_side: int = Field(16, ge=1, description="images whose shorter side has fewer pixels are too_small")
    max_image_pixels: int = Field(100_000_000, ge=1, description="images with more pixels are too_large, undecoded")
    max_aspect: float = Field(MAX_GRID_ASPECT, ge=1, description="longest side over shortest; beyond it unsupported")
    path_column: str | None = Field(None, description="column of paths in tables, where it has none of the usual names")
    text_column: str | None = Field(None, description="column of captions in tables and datasets, likewise")
    image_folder: str | None = Field(None, description="where the paths in tables begin, if not beside the table")
    image_key: str | None = Field(
        None, min_length=1, description="extensions of the one image of each key in tars, by commas"
    )

    within: str | None = Field(None, description="folder that the paths in tables and data sets must lie in")
    public_only: bool = Field(False, description="no URLs of loopback and private addresses in tables and data sets")
    follow_links: bool = Field(False, description="links and lists of a folder may lead out of it")

    @field_validator("accept")
    @classmethod
    def _accept_is_known(cls, accept: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in accept if name not in ACCEPTED]:
            raise BadInput(f"--accept {unknown[0]}: unknown; one of {', '.join(ACCEPTED)}, or all")
        return tuple(name for name in ACCEPTED if name in accept)

    @model_validator(mode="after")
    def _transcode_has_something_to_do(self) -> IngestConfig:
        if self.transcode is not None and not self.accept:
            raise BadInput("--transcode: of the formats that --accept names, and it names none")
        if self.quality is not None and self.transcode not in ("jpeg", "webp"):
            raise BadInput("--quality: of --transcode jpeg or webp; leave it out")
        return self

    @property
    def reach(self) -> Reach:
        return Reach(self.within, self.public_only)

    @property
    def columns(self) -> Columns:
        return Columns(self.path_column, self.text_column, self.image_folder)

    @property
    def limits(self) -> ImageLimits:
        plain = ImageLimits(self.max_image_pixels, self.min_side, self.max_aspect)
        return replace(plain, accept=plain.accept.union(self.accept))

    @property
    def encoding(self) -> Encoding | None:
        return None if self.transcode is None else Encoding(self.transcode, self.quality or DEFAULT_QUALITY)

    @property
    def schema(self) -> pa.Schema:
        return INGEST if self.transcode is None else TRANSCODED


@dataclass(frozen=True, slots=True)
class IngestTask:
    """One output shard: its items in order. ``digest``: sha256 over their identities, compared on resume.

    ``made``: the committed version, whose unreadable rows are retried. ``careful``: a worker died of this task, so each
    image is decoded in a process of its own.
    """

    index: int
    refs: tuple[ItemRef, ...]
    digest: str
    made: ShardRecord | None = None
    careful: bool = False

    @property
    def shard(self) -> str:
        return f"{self.index:05d}"


def plan(refs: Iterable[ItemRef], config: IngestConfig) -> Iterator[IngestTask]:
    """Split the items into tasks, lazily: shard i has items i*shard_size up to (i+1)*shard_size."""
    stream, index = iter(refs), 0
    while chunk := tuple(islice(stream, config.shard_size)):
        yield _task(index, chunk)
        index += 1


def _task(index: int, refs: tuple[ItemRef, ...], committed: ShardRecord | None = None) -> IngestTask:
    digest = hashlib.sha256()
    for ref in refs:
        digest.update(ref.identity().encode() + b"\n")
    return IngestTask(index, refs, digest.hexdigest(), committed)


def pending(tasks: Iterable[IngestTask], artifact: Artifact) -> Iterator[IngestTask]:
    """Tasks that are not committed yet, and tasks of committed shards with unreadable rows.

    Items added to the source since start new shards, whatever their position (:mod:`.growth`).
    Raises ArtifactMismatch if an ingested item is gone or has changed.
    """
    committed, tasks = artifact.committed(), iter(tasks)
    taken = {int(shard) for shard in committed}
    for task in tasks:
        record = committed.get(task.shard)
        if record is not None and record.input["digest"] != task.digest:
            tasks = chain([task], tasks)
            break
        committed.pop(task.shard, None)
        taken.add(task.index)
        if record is None:
            yield task
        elif record.unresolved:
            yield replace(task, made=record)
    if committed:
        refs = (ref for task in tasks for ref in task.refs)
        for items, again in grown(artifact, committed, refs):
            if again is not None:
                yield _task(int(again.shard), items, again)
            else:
                index = next(index for index in count() if index not in taken)
                taken.add(index)
                yield _task(index, items)


def ingest_shard(task: IngestTask, config: IngestConfig, artifact: Artifact) -> ShardRecord:
    """Write and commit one shard. Runs in a worker process, which reads the images itself.

    In a shard committed before, rows that were read keep their bytes; if none of the others can be read this time
    either, the shard stays unchanged.
    """
    digits = len(str(config.shard_size - 1))
    with Handles() as handles, ImageCheck(config.limits, task.careful, config.encoding) as check:

        def ingested(number: int) -> ItemRow:
            key = f"{task.index:05d}{number:0{digits}d}"  # img2dataset's keys
            return ingest_item(task.refs[number], key, check, handles)

        if task.made is None:
            rows: Iterable[ItemRow] = map(ingested, range(len(task.refs)))
        else:
            again = repaired_rows(artifact, task.made, ingested)
            if again is None:
                return task.made
            rows = again
        with artifact.begin(task.shard, config.schema, tar=True, over=task.made) as shard:
            for row, members in rows:
                shard.write(row, members)
            return shard.commit(
                rows_in=len(task.refs),
                input_info={"digest": task.digest, "items": len(task.refs)},
                beside={items_file(task.shard): marks_of(task.refs)},
            )


def ingest_item(
    ref: ItemRef, key: str, check: Callable[[bytes], ImageInfo | ImageProblem], handles: Handles
) -> ItemRow:
    """One item as ``(row, tar members)``; no members unless the row is ok. Its content raises nothing."""
    try:
        item = ref.load(handles)
        verdict = item.problem or check(item.data or b"")
        item.notes += advice(item.data or b"", verdict)
        original: dict[str, str] = {}
        if isinstance(verdict, ImageInfo) and verdict.transcoded is not None:
            original = {"original_sha256": _sha256(item.data or b""), "original_format": verdict.transcoded.original}
            item.data = verdict.transcoded.data
        sha256 = _sha256(item.data) if item.data else None
        members = _members(item, verdict, sha256, original) if isinstance(verdict, ImageInfo) and sha256 else None
        return {**_row(item, key, verdict, sha256), **original}, members
    except RunFailed:
        raise
    except Exception as error:  # one bad item must not fail its shard: its error goes into the row
        unexpected = ImageProblem(Status.CORRUPT, f"unexpected {type(error).__name__}: {error}")
        return _row(Item(ref.source), key, read_problem(error) or unexpected, None), None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _row(item: Item, key: str, verdict: ImageInfo | ImageProblem, sha256: str | None) -> dict[str, Any]:
    row = {
        "key": key,
        "uid": sha256[:32] if sha256 else None,
        "sha256": sha256,
        "text": clean(item.text),
        "url": clean(item.url),
        "source": item.source,
    }
    if isinstance(verdict, ImageProblem):
        return {**row, "status": verdict.status, "error": clean("; ".join([verdict.reason, *item.notes]))}
    image = {"phash": verdict.phash, "width": verdict.width, "height": verdict.height, "format": verdict.format}
    return {**row, **image, "status": Status.OK, "error": clean("; ".join(item.notes)) or None}


def _members(item: Item, info: ImageInfo, sha256: str, original: Mapping[str, str]) -> dict[str, bytes]:
    """Tar members of a sample: always the same three, as the webdataset reader of `datasets` requires."""
    ours = {"uid": sha256[:32], "width": info.width, "height": info.height, "source": item.source, **original}
    try:
        meta = encode_meta(item.meta, ours)
    except RecursionError:
        item.notes.append("json is nested too deeply: left out")
        meta = encode_meta({}, ours)
    text = item.text or ""
    return {info.format: item.data or b"", "txt": text.encode("utf-8", "replace"), "json": meta}


def clean(text: str | None) -> str | None:
    """Text made valid for UTF-8: JSON may have unpaired surrogates."""
    return None if text is None else text.encode("utf-8", "replace").decode()
