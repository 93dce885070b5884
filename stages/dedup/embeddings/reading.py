"""Image embeddings for dedup, read from artifacts: those of the files, and those of reference sets.

A part is some consecutive shards whose vectors fit into memory: the unit in which they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ....errors import ArtifactMismatch, BadInput
from ....manifests.artifact import Artifact
from ....manifests.schema import EMBEDDING_COLUMN, embedding_width
from ..arrays import NONE, Indices
from ..hash_sets import HashSet
from .forest import Vectors

_BATCH = 1000  # rows per batch
PART_BYTES = 1 << 28  # of the vectors of a part
_UID = 32  # hex digits


@dataclass(frozen=True)
class ShardGroup:
    """Shards whose embeddings are read by one task. ``number``: among all parts; ``hashes``: the artifact that has the
    rows of these shards, with their keys and uids; None for references, which have no other rows."""

    number: int
    artifact: Artifact
    shards: tuple[str, ...]
    hashes: Artifact | None
    width: int


@dataclass(frozen=True)
class ReferenceVectors:
    """Reference images known by their embeddings. ``rows``: number of the image of each row, all shards of all
    artifacts concatenated, -1 for rows without one; ``starts``: first row of each shard."""

    shards: tuple[tuple[Artifact, str], ...]
    rows: Indices
    starts: Indices
    count: int

    def names(self, wanted: Indices) -> dict[int, str]:
        """The lowest name of each wanted image: its artifact's, its shard's and its key."""
        names: dict[int, str] = {}
        for (artifact, shard), (low, high) in zip(self.shards, pairwise(self.starts.tolist()), strict=True):
            images = self.rows[low:high]
            chosen = np.flatnonzero(np.isin(images, wanted))
            keys = artifact.table(shard, ["key"])["key"].take(pa.array(chosen)).to_pylist() if len(chosen) else []
            for image, key in zip(images[chosen].tolist(), keys, strict=True):
                name = f"{artifact.url}/{shard}: {key}"
                names[image] = min(names.get(image, name), name)
        return names


def check_embeddings(artifact: Artifact, shards: Sequence[str]) -> int:
    """The width of the embeddings of some shards. Raises BadInput if a shard has none, ArtifactMismatch if those
    present are not valid."""
    committed = artifact.committed()
    for name in shards:
        if name not in committed:
            raise BadInput(f"{artifact.url}: has no embeddings of shard {name}; finish its run, or narrow --shards")
    if not shards:
        raise BadInput(f"{artifact.url}: no shard is committed there yet; run `capipe embed` to the end first")
    widths = sorted({_width(artifact, name) for name in shards})
    if len(widths) > 1:
        raise ArtifactMismatch(f"{artifact.url}: embeddings of {widths[0]} and of {widths[-1]} numbers; make it again")
    return widths[0]


def check_same_space(embeddings: Artifact, width: int, reference: Artifact) -> None:
    """Raise BadInput unless a reference set's embeddings can be compared with those of the images."""
    other = check_embeddings(reference, sorted(reference.committed()))
    fix = "embed both with the same --clip"
    if other != width:
        text = f"{reference.url}: embeddings of {other} numbers, but {embeddings.url} has {width}"
        raise BadInput(f"{text}; {fix}")
    ours, theirs = (one.config["semantic"].get("scorers") for one in (embeddings, reference))
    if ours != theirs:
        text = f"{reference.url}: embeddings by another tower (other weights, dtype or preprocessing)"
        raise BadInput(f"{text} than {embeddings.url}; {fix}")


def parts_of_files(artifact: Artifact, hashed: HashSet, width: int) -> list[tuple[ShardGroup, Indices]]:
    """The parts of the files' embeddings, each with the file of each of its rows."""
    shards = [(artifact, shard) for shard in hashed.shards]
    return _parts(shards, hashed.starts, hashed.rows, width, 0, hashed.artifact)


def parts_of_references(
    references: ReferenceVectors, width: int, first: int, files: int
) -> list[tuple[ShardGroup, Indices]]:
    """The parts of references, from number ``first`` on, each with its rows' nodes: images are numbered after files."""
    nodes = np.where(references.rows >= 0, references.rows + files, -1)
    return _parts(references.shards, references.starts, nodes, width, first, None)


def _parts(
    shards: Sequence[tuple[Artifact, str]],
    starts: Indices,
    rows: Indices,
    width: int,
    first: int,
    hashes: Artifact | None,
) -> list[tuple[ShardGroup, Indices]]:
    most, parts, begin = max(1, PART_BYTES // (2 * width)), list[tuple[ShardGroup, Indices]](), 0
    for end in range(1, len(shards) + 1):
        full = end == len(shards) or starts[end + 1] - starts[begin] > most
        if full or shards[end][0] is not shards[begin][0]:
            names = tuple(shard for _, shard in shards[begin:end])
            part = ShardGroup(first + len(parts), shards[begin][0].attach(), names, hashes and hashes.attach(), width)
            parts.append((part, rows[starts[begin] : starts[end]]))
            begin = end
    return parts


def read_references(artifacts: Sequence[Artifact]) -> ReferenceVectors:
    """The images of reference sets: a distinct uid is one image, numbered in the order of uids."""
    shards = tuple((artifact, shard) for artifact in artifacts for shard in sorted(artifact.committed()))
    columns = [artifact.table(shard, ["uid"])["uid"] for artifact, shard in shards]
    starts = np.cumsum([0, *(len(column) for column in columns)])
    uids = np.concatenate([np.array(column.fill_null("").to_pylist(), dtype=f"S{_UID}") for column in columns])
    known = uids != b""
    distinct, inverse = np.unique(uids[known], return_inverse=True)
    rows = np.full(len(uids), -1, dtype=np.int64)
    rows[known] = inverse
    return ReferenceVectors(shards, rows, starts, len(distinct))


def read_part(part: ShardGroup, nodes: Indices) -> tuple[Indices, Vectors]:
    """The distinct nodes with a usable vector in a part, ascending, and the vectors. ``nodes``: of each row.

    Not usable is what is missing, has a NaN or an infinity, or is all zeros. Raises ArtifactMismatch unless the rows
    are those of the hashes one to one.
    """
    of_vectors, vectors = [NONE], [np.empty((0, part.width), dtype=np.float16)]
    start = 0
    for shard in part.shards:
        for sound, numbers in _shard_vectors(part, shard):
            rows = nodes[start : start + len(sound)]
            start += len(sound)
            wanted = rows[sound] >= 0
            of_vectors.append(rows[sound][wanted])
            vectors.append(numbers[wanted])
    distinct, first = np.unique(np.concatenate(of_vectors), return_index=True)
    return distinct, np.concatenate(vectors)[first]


def _shard_vectors(part: ShardGroup, shard: str) -> Iterator[tuple[npt.NDArray[np.bool_], Vectors]]:
    """Batch by batch, the mask of rows with a usable vector, and these vectors."""
    where = f"{part.artifact.url}/{shard}.parquet"
    rows = None if part.hashes is None else part.hashes.table(shard, ["key", "uid"])
    at = 0
    with part.artifact.parquet(shard) as file:
        for batch in file.iter_batches(_BATCH, columns=["key", "uid", EMBEDDING_COLUMN], use_threads=False):
            if rows is not None:
                _check_rows(where, batch, rows.slice(at, len(batch)))
            at += len(batch)
            yield _sound(batch.column(EMBEDDING_COLUMN))
    if rows is not None and at != len(rows):
        raise _other_images(where, f"{at} rows for {len(rows)}")


def _width(artifact: Artifact, shard: str) -> int:
    with artifact.parquet(shard) as file:
        return embedding_width(file.schema_arrow, f"{artifact.url}/{shard}.parquet")


def _check_rows(where: str, batch: pa.RecordBatch, rows: pa.Table) -> None:
    for name in ("key", "uid"):
        ours, theirs = batch.column(name), rows[name].combine_chunks()
        if not ours.equals(theirs):
            other = next(
                (a, b) for a, b in zip([*ours.to_pylist(), None], [*theirs.to_pylist(), None], strict=False) if a != b
            )
            raise _other_images(where, f"{name} {other[1]!r} expected, {other[0]!r} found")


def _other_images(where: str, what: str) -> ArtifactMismatch:
    return ArtifactMismatch(f"{where}: {what}; these are embeddings of other images: give those made of these --shards")


def _sound(column: pa.Array) -> tuple[npt.NDArray[np.bool_], Vectors]:
    """Mask of the rows with a usable vector, and those vectors."""
    sound = pc.is_valid(column).to_numpy(zero_copy_only=False).astype(bool)
    flat = column.filter(pa.array(sound)).flatten().to_numpy(zero_copy_only=False)
    numbers = flat.astype(np.float16).reshape(-1, column.type.list_size)
    usable = np.isfinite(numbers).all(axis=1) & (numbers != 0).any(axis=1)
    sound[sound] = usable
    return sound, numbers[usable]
