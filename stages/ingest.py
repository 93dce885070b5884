"""Ingest: items of any source become image shards. One task is one output shard, done by one process from start to end.

Every item becomes exactly one row. Sound images are copied untouched into the tar beside their text and metadata (with
``convert`` those in other formats as PNGs); what is not sound stays in the Parquet with its reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ArtifactMismatch
from ..manifests.artifact import Artifact
from ..manifests.manifest import ShardRecord
from ..manifests.schema import INGEST
from ..manifests.sidecars import encode_meta
from ..manifests.status import Status
from ..models.convert import Converted, is_convertible, to_png
from ..models.formats import ImageProblem
from ..models.images import MAX_GRID_ASPECT, ImageInfo, ImageLimits, check
from .columns import Columns
from .items import Handles, Item, ItemRef

STAGE = "ingest"


class IngestConfig(BaseModel):
    """What decides the rows of an ingest; all of it is in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard_size: int = Field(10_000, ge=1, le=1_000_000, description="items per shard, usable or not")
    convert: bool = Field(False, description="pictures in other formats than JPEG, PNG and WebP become PNGs")
    min_side: int = Field(16, ge=1, description="images whose shorter side has fewer pixels are too_small")
    max_image_pixels: int = Field(100_000_000, ge=1, description="images with more pixels are too_large, undecoded")
    max_aspect: float = Field(MAX_GRID_ASPECT, ge=1, description="longest side over shortest; beyond it unsupported")
    path_column: str | None = Field(None, description="column of paths in tables, where it has none of the usual names")
    text_column: str | None = Field(None, description="column of captions in tables and datasets, likewise")
    image_folder: str | None = Field(None, description="where the paths in tables begin, if not beside the table")
    image_key: str | None = Field(
        None, min_length=1, description="extensions of the one image of each key in tars, by commas"
    )

    @property
    def columns(self) -> Columns:
        return Columns(self.path_column, self.text_column, self.image_folder)

    @property
    def limits(self) -> ImageLimits:
        return ImageLimits(self.max_image_pixels, self.min_side, self.max_aspect)


@dataclass(frozen=True, slots=True)
class IngestTask:
    """One output shard: its items in order. ``digest``: sha256 over their identities, which resuming compares."""

    index: int
    refs: tuple[ItemRef, ...]
    digest: str

    @property
    def shard(self) -> str:
        return f"{self.index:05d}"


def plan(refs: Iterable[ItemRef], config: IngestConfig) -> Iterator[IngestTask]:
    """Cut the items into tasks, lazily: shard i has items i*shard_size up to (i+1)*shard_size."""
    stream, index = iter(refs), 0
    while chunk := tuple(islice(stream, config.shard_size)):
        digest = hashlib.sha256()
        for ref in chunk:
            digest.update(ref.identity().encode() + b"\n")
        yield IngestTask(index, chunk, digest.hexdigest())
        index += 1


def pending(tasks: Iterable[IngestTask], artifact: Artifact) -> Iterator[IngestTask]:
    """The tasks that are not committed yet.

    Raises ArtifactMismatch where a committed shard was made from other items than the source now has in its place.
    """
    committed = artifact.committed()
    for task in tasks:
        record = committed.pop(task.shard, None)
        if record is None:
            yield task
        elif record.input["digest"] != task.digest:
            raise _changed(artifact, task.shard, "has other items now")
    if committed:
        raise _changed(artifact, min(committed), "has fewer items now")


def _changed(artifact: Artifact, shard: str, what: str) -> ArtifactMismatch:
    text = f"{artifact.url}: the source {what} than when shard {shard} was ingested"
    return ArtifactMismatch(f"{text}; use another --out, or --fresh to start over")


def ingest_shard(task: IngestTask, config: IngestConfig, artifact: Artifact) -> ShardRecord:
    """Write and commit one shard. Runs in a worker process, which reads the images itself."""
    digits = len(str(config.shard_size - 1))
    with Handles() as handles, artifact.begin(task.shard, INGEST, tar=True) as shard:
        for number, ref in enumerate(task.refs):
            key = f"{task.index:05d}{number:0{digits}d}"  # img2dataset's keys
            shard.write(*ingest_item(ref, key, config.limits, handles, convert=config.convert))
        return shard.commit(rows_in=len(task.refs), input_info={"digest": task.digest, "items": len(task.refs)})


def ingest_item(
    ref: ItemRef, key: str, limits: ImageLimits, handles: Handles, *, convert: bool = False
) -> tuple[dict[str, Any], dict[str, bytes] | None]:
    """One item as ``(row, tar members)``; no members unless the row is ok. Never raises on what the item holds."""
    try:
        item = ref.load(handles)
        original = _convert(item, limits) if convert else {}
        verdict = item.problem or check(item.data or b"", limits)
        if not convert and isinstance(verdict, ImageProblem) and is_convertible(item.data or b""):
            item.notes.append("--convert takes still ones")
        sha256 = hashlib.sha256(item.data).hexdigest() if item.data else None
        members = _members(item, verdict, sha256, original) if isinstance(verdict, ImageInfo) and sha256 else None
        return _row(item, key, verdict, sha256), members
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    except Exception as error:  # one item must not cost its shard: whatever it did becomes its reason
        reason = f"unexpected {type(error).__name__}: {error}"
    return _row(Item(ref.source), key, ImageProblem(Status.CORRUPT, reason), None), None


def _convert(item: Item, limits: ImageLimits) -> dict[str, str]:
    """Put a PNG in place of a picture in another format; returns what it was, for the row's metadata."""
    if item.data is None or item.problem is not None:
        return {}
    converted = to_png(item.data, limits)
    if isinstance(converted, ImageProblem):
        item.problem = converted
    if not isinstance(converted, Converted):
        return {}
    original = {"original_sha256": hashlib.sha256(item.data).hexdigest(), "original_format": converted.format}
    item.data = converted.data
    return original


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
    found = {"phash": verdict.phash, "width": verdict.width, "height": verdict.height, "format": verdict.format}
    return {**row, **found, "status": Status.OK, "error": clean("; ".join(item.notes)) or None}


def _members(item: Item, info: ImageInfo, sha256: str, original: Mapping[str, str]) -> dict[str, bytes]:
    """Every sample has the same three members, or the webdataset reader of `datasets` would refuse the shard."""
    ours = {"uid": sha256[:32], "width": info.width, "height": info.height, "source": item.source, **original}
    try:
        meta = encode_meta(item.meta, ours)
    except RecursionError:
        item.notes.append("json is nested too deeply: left out")
        meta = encode_meta({}, ours)
    text = item.text or ""
    return {info.format: item.data or b"", "txt": text.encode("utf-8", "replace"), "json": meta}


def clean(text: str | None) -> str | None:
    """Text that UTF-8 can hold: JSON may bring half of a surrogate pair."""
    return None if text is None else text.encode("utf-8", "replace").decode()
