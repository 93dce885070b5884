"""Dedup marks: near-duplicates, placeholders, and contamination by a reference set. Marks rows, never deletes.

Two passes. The first hashes every image, shard by shard. The second reads the hashes only: it groups all images at once
and writes a mark for every row. So the groups depend on the images and on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ...manifests.artifact import Artifact
from ...manifests.manifest import ShardRecord
from ...manifests.schema import DEDUP, HASHES
from ...manifests.shards import InputShard, RowReader
from ...manifests.status import Status
from ...models.images.decode import ANIMATED, EVERYTHING, ImageLimits, thumbnail
from ...models.images.formats import ImageProblem
from ...models.images.openers import decodable
from ..ingest.shard import IngestConfig, IngestTask
from ..ingest.source_refs import Handles
from ..reading.faults import read_problem
from .arrays import Indices, Numbers
from .embeddings.reading import ReferenceVectors
from .embeddings.work import NearFiles
from .groups import connected, keepers, lookalikes
from .hash_sets import HashSet, hash_rows
from .perceptual_hash import DECODED_SIDE, looks

STAGE, HASH_STAGE = "dedup", "hash"
LIMITS = ImageLimits(min_side=1)  # small images: ingest has rejected them, or they are accepted
OWN_LIMITS = replace(LIMITS, accept=EVERYTHING)  # of shards that capipe wrote
Pairs = tuple[Indices, Indices]
LARGEST, NEAREST, FARTHEST = "largest", "nearest", "farthest"  # choices of a keeper; any other is a column's name
REFERENCES = IngestConfig(shard_size=1000)  # how a reference set is cut into tasks


class DedupConfig(BaseModel):
    """Options that determine the marks; all of them are in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    radius: int = Field(7, ge=0, le=15, description="bits of 64 in which the hashes of two copies may differ")
    placeholder: int = Field(100, ge=1, description="the same bytes in more rows than this are a placeholder")
    cosine: float | None = Field(None, ge=0.5, le=1, description="embeddings this near each other are of copies, too")
    keeper: str = Field(LARGEST, description="which of a group is kept: largest, nearest, farthest, or by a column")

    def semantic(self) -> dict[str, Any]:
        """What fingerprints cover; an option that is newer than outputs, only where it is used."""
        used = self.model_dump(mode="json")
        return {key: value for key, value in used.items() if (key, value) != ("keeper", LARGEST)}


# --- first pass: one shard's images -----------------------------------------------------------------------------------


def hash_shard(task: InputShard, artifact: Artifact) -> ShardRecord:
    """Hash the images of one shard; write and commit."""
    reader, rows = RowReader(task), 0
    limits = LIMITS if task.record is None else OWN_LIMITS
    with artifact.begin(task.name, HASHES) as shard:
        for row in reader:
            base = {"key": row.key, "uid": row.uid, "status": row.status, "error": row.error}
            image = row.image if row.status is Status.OK else None
            shard.write(base if image is None else {**base, **_seen(image, limits)})
            rows += 1
        return shard.commit(rows_in=rows, input_info=reader.info)


def hash_references(task: IngestTask, artifact: Artifact) -> ShardRecord:
    """Hash a part of a reference set, whose items may come from any source that can be ingested."""
    limits = replace(LIMITS, accept=decodable() | {ANIMATED})
    with Handles() as handles, artifact.begin(task.shard, HASHES, over=task.made) as shard:
        for number, ref in enumerate(task.refs):
            row = {"key": f"{task.index:05d}{number:03d}", "source": ref.source}
            try:
                item = ref.load(handles)
                problem, data = item.problem, item.data
            except Exception as error:
                problem, data = read_problem(error), None
                if problem is None:
                    raise
            if problem is None and data is not None:
                shard.write({**row, "uid": hashlib.sha256(data).hexdigest()[:32], **_seen(data, limits)})
            else:
                reason = problem or ImageProblem(Status.CORRUPT, "no bytes")
                shard.write({**row, "status": reason.status, "error": reason.reason})
        return shard.commit(rows_in=len(task.refs), input_info={"digest": task.digest, "items": len(task.refs)})


def _seen(data: bytes, limits: ImageLimits) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    small = thumbnail(data, limits, DECODED_SIDE)
    if isinstance(small, ImageProblem):
        return {"sha256": sha256, "status": small.status, "error": small.reason}
    seen = looks(small.image)
    return {
        "sha256": sha256,
        "status": Status.OK,
        "width": small.width,
        "height": small.height,
        "phash": seen.phash,
        "inner": seen.inner,
        "signature": seen.signature,
        "look": seen.look,
    }


# --- second pass: all images at once ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marks:
    """Result for each distinct file. ``keeper``: index of the file kept of its group; it identifies the group.

    ``originals``: key and shard of the row kept of a file, for files with further rows or near-duplicates.
    ``matched``: reference image by group. ``placeholders``: number of occurrences, by group that has a placeholder.
    """

    hashed: HashSet
    keeper: Indices
    originals: Mapping[int, tuple[str, str]]
    matched: Mapping[int, str] = field(default_factory=dict)
    placeholders: Mapping[int, int] = field(default_factory=dict)


def find_marks(
    hashed: HashSet,
    references: HashSet | None,
    config: DedupConfig,
    near: Pairs,
    embedded: NearFiles | None = None,
    embedded_references: ReferenceVectors | None = None,
    preference: Numbers | None = None,
) -> Marks:
    """Group the images. Groups and keepers do not depend on the order of the shards.

    ``near``: what :class:`~.near.work.NearSearch` found; ``embedded``: what is near by embeddings; ``preference``: of
    each file, see :func:`.groups.keepers`.
    """
    contents = hashed.contents
    first = lookalikes(contents)
    alike = np.flatnonzero(first != np.arange(len(first)))
    left, right = near
    files = right < len(contents)
    joined = [(left[files], right[files]), (alike, first[alike]), *_pairs(embedded)]
    groups = connected(len(contents), *(np.concatenate([pairs[side] for pairs in joined]) for side in (0, 1)))
    keeper = keepers(contents, groups, preference)
    matched = {}
    if embedded is not None and embedded_references is not None:
        matched = _near_references(embedded, embedded_references, keeper)
    if references is not None:
        matched |= _matches(hashed, references, keeper, (left[~files], right[~files] - len(contents)))
    frequent = np.flatnonzero(hashed.counts > config.placeholder)
    placeholders: dict[int, int] = {}
    for file in frequent.tolist():
        group = int(keeper[file])
        placeholders[group] = max(placeholders.get(group, 0), int(hashed.counts[file]))
    named = np.zeros(len(contents), dtype=bool)
    named[keeper[keeper != np.arange(len(contents))]] = True
    named[hashed.counts > 1] = True
    return Marks(hashed, keeper, hashed.first_keys(named), matched, placeholders)


def _pairs(embedded: NearFiles | None) -> list[Pairs]:
    return [] if embedded is None else [(embedded.edges.left, embedded.edges.right)]


def _near_references(embedded: NearFiles, references: ReferenceVectors, keeper: Indices) -> dict[int, str]:
    """Reference image whose embedding is nearest to one of the group's; of equally near ones the lowest uid."""
    matches, nearest = embedded.matches, dict[int, int]()
    order = np.lexsort((matches.right, -matches.cosine))
    for group, reference in zip(keeper[matches.left[order]].tolist(), matches.right[order].tolist(), strict=True):
        nearest.setdefault(group, reference)
    names = references.names(np.unique(np.fromiter(nearest.values(), dtype=np.int64)))
    return {group: names[reference] for group, reference in nearest.items()}


def _matches(hashed: HashSet, references: HashSet, keeper: Indices, near: Pairs) -> dict[int, str]:
    """Reference image that each group repeats; the one with the lowest uid of several."""
    _, of_file, of_reference = np.intersect1d(
        hashed.contents.uids, references.contents.uids, assume_unique=True, return_indices=True
    )
    groups = keeper[np.concatenate([near[0], of_file])]
    matches = np.concatenate([near[1], of_reference])
    lowest: dict[int, int] = {}
    for group, reference in zip(groups.tolist(), matches.tolist(), strict=True):
        lowest[group] = min(lowest.get(group, reference), reference)
    wanted = np.zeros(len(references.contents), dtype=bool)
    wanted[list(lowest.values())] = True
    sources = references.first_keys(wanted, "source")
    return {group: sources[reference][0] for group, reference in lowest.items()}


def mark_shard(
    shard: str,
    record: ShardRecord,
    marks: Marks,
    artifact: Artifact,
    by: Mapping[str, Any] | None = None,
    over: ShardRecord | None = None,
) -> ShardRecord:
    """Write and commit the marks of one shard's rows, replacing older ones (``over``), if any.

    ``record``: the shard's record in the hashes' manifest; ``by``: what the groups depend on, for the manifest.
    """
    with artifact.begin(shard, DEDUP, over=over) as out:
        for row, file in _rows(shard, marks.hashed):
            out.write({**_plain(row), **(_mark(row, shard, file, marks) if file >= 0 else {})})
        digest = str(record.files[f"{shard}.parquet"]["sha256"])
        return out.commit(rows_in=record.count, input_info={"digest": digest, **(by or {})})


def _rows(shard: str, hashed: HashSet) -> Iterator[tuple[dict[str, Any], int]]:
    columns = ["key", "uid", "status", "error", "sha256", "phash", "width", "height"]
    return zip(hash_rows(hashed.artifact, shard, columns), hashed.files_of(shard).tolist(), strict=True)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "phash": None if row["phash"] is None else f"{row['phash']:016x}"}


def _mark(row: Mapping[str, Any], shard: str, file: int, marks: Marks) -> dict[str, Any]:
    """Mark of a row with a valid image; contamination takes precedence over duplication."""
    hashed, kept = marks.hashed, int(marks.keeper[file])
    copies = int(hashed.counts[file])
    out = {"group": hashed.contents.uids[kept].ljust(16, b"\0").hex(), "copies": copies}
    if (reference := marks.matched.get(kept)) is not None:
        return {
            **out,
            "status": Status.CONTAMINATED,
            "matched": reference,
            "error": f"shows the reference image {reference}",
        }
    if (times := marks.placeholders.get(kept)) is not None:
        if copies == times:
            return {**out, "status": Status.DUPLICATE, "error": f"placeholder: these bytes occur {times} times"}
        return {**out, "status": Status.DUPLICATE, "error": f"looks like a placeholder that occurs {times} times"}
    original = marks.originals.get(kept)
    if original is None or original == (row["key"], shard):
        return out
    how = "the same bytes as" if kept == file else "looks like"
    return {**out, "status": Status.DUPLICATE, "duplicate_of": original[0], "error": f"{how} {original[0]}"}


def digest_of(artifact: Artifact, shards: Sequence[str]) -> str:
    """sha256 over the committed contents of ``shards``; independent of the time of writing."""
    committed = artifact.committed()
    digest = hashlib.sha256()
    for name in shards:
        digest.update(f"{name} {committed[name].files[f'{name}.parquet']['sha256']}\n".encode())
    return digest.hexdigest()
