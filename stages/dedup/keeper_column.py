"""A column of another artifact, such as a score, by which dedup chooses which of a group is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ...errors import ArtifactMismatch, BadInput
from ...manifests.artifact import Artifact
from .arrays import Numbers
from .hash_sets import HashSet


def check_column(artifact: Artifact, shards: Sequence[str], column: str) -> None:
    """Raise BadInput unless all shards have a column of numbers of this name."""
    committed = artifact.committed()
    for shard in shards:
        if shard not in committed:
            raise BadInput(f"{artifact.url}: has no shard {shard}; finish its run, or narrow --shards")
        with artifact.parquet(shard) as file:
            numbers = [field.name for field in file.schema_arrow if _is_number(field.type)]
        if column not in numbers:
            has = f"it has {', '.join(numbers)}" if numbers else "it has none"
            raise BadInput(f"{artifact.url}/{shard}.parquet: no column {column!r} of numbers for --keeper; {has}")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def read_column(artifact: Artifact, hashed: HashSet, column: str) -> Numbers:
    """The highest value of each file's rows, ``(n,)``; NaN where there is none.

    Raises ArtifactMismatch unless the rows are those of the hashes one to one.
    """
    best = np.full(len(hashed.contents), np.nan)
    for shard in hashed.shards:
        files, table = hashed.files_of(shard), artifact.table(shard, ["key", "uid", column])
        rows = hashed.artifact.table(shard, ["key", "uid"])
        if not all(table[name].equals(rows[name]) for name in ("key", "uid")):
            text = f"{artifact.url}/{shard}.parquet: its rows are not those of the images"
            raise ArtifactMismatch(f"{text}; give scores made of these --shards")
        values = table[column].cast(pa.float64(), safe=False).to_numpy()
        np.fmax.at(best, files[files >= 0], values[files >= 0])
    return best
