"""Image embeddings for dedup, read from an artifact with one row per row of the shards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import ArtifactMismatch, BadInput
from ...manifests.artifact import Artifact
from ...manifests.schema import EMBEDDING_COLUMN, embedding_width
from .arrays import Indices
from .cosine import Vectors, near_vectors
from .hash_sets import HashSet

_BATCH = 1000  # rows per batch


@dataclass(frozen=True)
class EmbeddingSet:
    """``vectors``: ``(n, width)`` float16, in a scratch file; ``files``: the file index in the hashes of each.

    ``skipped``: number of files whose embedding is missing, has a NaN or an infinity, or is all zeros.
    """

    vectors: Vectors
    files: Indices
    skipped: int


def check_embeddings(artifact: Artifact, shards: Sequence[str]) -> None:
    """Raise BadInput if a shard has no embeddings, ArtifactMismatch if those present are not valid."""
    committed = artifact.committed()
    for name in shards:
        if name not in committed:
            raise BadInput(f"{artifact.url}: has no embeddings of shard {name}; finish its run, or narrow --shards")
    widths = sorted({_width(artifact, name) for name in shards})
    if len(widths) > 1:
        raise ArtifactMismatch(f"{artifact.url}: embeddings of {widths[0]} and of {widths[-1]} numbers; make it again")


def read_embeddings(artifact: Artifact, hashed: HashSet, scratch: Path) -> EmbeddingSet:
    """One vector per file. Raises ArtifactMismatch unless rows match those of the hashes one to one."""
    count = len(hashed.contents)
    shape = max(count, 1), _width(artifact, hashed.shards[0])
    vectors: Vectors = np.memmap(scratch, dtype=np.float16, mode="w+", shape=shape)[:count]
    usable = np.zeros(count, dtype=bool)
    for shard in hashed.shards:
        for files, numbers in _shard_vectors(artifact, hashed, shard):
            vectors[files], usable[files] = numbers, True
    kept = np.flatnonzero(usable)
    for start in range(0, len(kept), _BATCH):  # compact in place, part by part: none is overwritten before it is read
        part = kept[start : start + _BATCH]
        vectors[start : start + len(part)] = vectors[part]
    return EmbeddingSet(vectors[: len(kept)], kept, count - len(kept))


def _shard_vectors(artifact: Artifact, hashed: HashSet, shard: str) -> Iterator[tuple[Indices, Vectors]]:
    """File indices and their vectors, batch by batch, in row order."""
    files, at, where = hashed.files_of(shard), 0, f"{artifact.url}/{shard}.parquet"
    rows = hashed.artifact.table(shard, ["key", "uid"])
    with artifact.parquet(shard) as file:
        wanted = ["key", "uid", EMBEDDING_COLUMN]
        for batch in file.iter_batches(_BATCH, columns=wanted, use_threads=False):
            _check_rows(where, batch, rows.slice(at, len(batch)))
            sound, numbers = _sound(batch.column(EMBEDDING_COLUMN))
            part = files[at : at + len(batch)][sound]
            yield part[part >= 0], numbers[part >= 0]
            at += len(batch)
    if at != len(files):
        raise _other_images(where, f"{at} rows for {len(files)}")


def near_embeddings(artifact: Artifact, hashed: HashSet, cosine: float) -> tuple[Indices, Indices, int]:
    """Pairs that connect all files with a cosine of at least ``cosine``, and the number of files without embedding."""
    with tempfile.TemporaryDirectory(prefix="capipe-dedup-") as folder:
        embedded = read_embeddings(artifact, hashed, Path(folder) / "vectors")
        blocks = list(near_vectors(embedded.vectors, cosine))
    none = np.empty(0, dtype=np.int64)
    i, j = (np.concatenate([none, *(block[k] for block in blocks)]) for k in (0, 1))
    return embedded.files[i], embedded.files[j], embedded.skipped


def _width(artifact: Artifact, shard: str) -> int:
    with artifact.parquet(shard) as file:
        return embedding_width(file.schema_arrow, f"{artifact.url}/{shard}.parquet")


def _check_rows(where: str, batch: pa.RecordBatch, rows: pa.Table) -> None:
    for name in ("key", "uid"):
        ours, theirs = batch.column(name).to_pylist(), rows[name].to_pylist()
        if ours != theirs:
            other = next((a, b) for a, b in zip([*ours, None], [*theirs, None], strict=False) if a != b)
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
