"""Reader of dedup's hash artifacts for the second pass: numbers of all files at once, signatures on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...manifests.artifact import Artifact
from ...manifests.schema import HASHES, check
from .arrays import Indices
from .groups import Contents
from .perceptual_hash import SIGNATURE_BYTES, Signatures

_NUMBERS = ["uid", "phash", "inner", "look", "width", "height"]
_BATCH = 1000  # rows of signatures per read: 6 MB


@dataclass(frozen=True)
class HashSet:
    """The files of a hash artifact. A file is a distinct sequence of bytes; rows without one have file -1.

    ``counts``: number of rows per file. ``rows``: file of each row, shards concatenated; ``starts``: first row of each
    shard. ``first``: one row of each file.
    """

    artifact: Artifact
    shards: tuple[str, ...]
    contents: Contents
    counts: Indices
    rows: Indices
    starts: Indices
    first: Indices

    def files_of(self, shard: str) -> Indices:
        """File of each row of a shard."""
        number = self.shards.index(shard)
        return self.rows[self.starts[number] : self.starts[number + 1]]

    def first_keys(self, wanted: npt.NDArray[np.bool_], column: str = "key") -> dict[int, tuple[str, str]]:
        """For each wanted file the lowest ``(key, shard)`` of its rows; ``column`` in place of the key."""
        lowest: dict[int, tuple[str, str]] = {}
        for shard in self.shards:
            files = self.files_of(shard)
            chosen = np.flatnonzero(files >= 0)
            chosen = chosen[wanted[files[chosen]]]
            if not len(chosen):
                continue
            table = self.artifact.table(shard, [column])
            names = table[column].take(pa.array(chosen)).to_pylist()
            for index, name in zip(files[chosen].tolist(), names, strict=True):
                lowest[index] = min(lowest.get(index, (name, shard)), (name, shard))
        return lowest


def read_hash_set(artifact: Artifact, shards: Sequence[str]) -> HashSet:
    """Read all columns but keys and signatures. Raises ArtifactMismatch if a file is not of this stage."""
    parts = [_numbers(artifact, shard) for shard in shards]
    uids, pixels, phash, inner, look = (np.concatenate([part[k] for part in parts]) for k in range(5))
    has_file = np.concatenate([part[5] for part in parts])
    distinct, first, inverse, counts = np.unique(uids, return_index=True, return_inverse=True, return_counts=True)
    rows = np.full(len(has_file), -1, dtype=np.int64)
    rows[has_file] = inverse
    starts = np.concatenate([[0], np.cumsum([len(part[5]) for part in parts])]).astype(np.int64)
    contents = Contents(distinct, pixels[first], phash[first], inner[first], look[first])
    return HashSet(artifact, tuple(shards), contents, counts, rows, starts, np.flatnonzero(has_file)[first])


def hash_rows(artifact: Artifact, shard: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some columns of a shard's rows, in order."""
    with artifact.parquet(shard) as file:
        for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _numbers(artifact: Artifact, shard: str) -> tuple[Any, ...]:
    """``uids, pixels, phash, inner, look`` of a shard's valid images, and the mask of their rows."""
    with artifact.parquet(shard) as parquet:
        check(parquet.schema_arrow, HASHES, f"{artifact.url}/{shard}.parquet")
        table = parquet.read(columns=_NUMBERS, use_threads=False)
    sound = pc.is_valid(table["phash"])
    table = table.filter(sound)
    uids = np.frombuffer(bytes.fromhex("".join(table["uid"].to_pylist())), dtype="S16")
    pixels = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
    hashes = (table[name].to_numpy().astype(np.uint64, copy=False) for name in ("phash", "inner", "look"))
    return uids, pixels, *hashes, sound.to_numpy().astype(bool)


def signature_batches(artifact: Artifact, shard: str) -> Iterator[Signatures]:
    """The signatures of a shard's rows, in order; those of rows without one have no meaning."""
    with artifact.parquet(shard) as file:
        for batch in file.iter_batches(_BATCH, columns=["signature"], use_threads=False):
            yield signatures_of(batch.column(0))


def signatures_of(column: pa.Array) -> Signatures:
    """Signatures ``(n, SIGNATURE_BYTES)`` of a column, without a copy."""
    data = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    end = (column.offset + len(column)) * SIGNATURE_BYTES
    return data[column.offset * SIGNATURE_BYTES : end].reshape(-1, SIGNATURE_BYTES)
