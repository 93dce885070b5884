"""Intermediate arrays as raw files beside a table: tasks read ranges of them, such as the vectors of some cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ....manifests.artifact import Artifact
from ....manifests.manifest import ShardRecord
from ....manifests.status import Status

Array = npt.NDArray[Any]
Arrays = Mapping[str, Iterable[Array]]  # by name, each in consecutive blocks


def write_arrays(artifact: Artifact, shard: str, columns: pa.Table, arrays: Arrays) -> ShardRecord:
    """Write and commit a shard: a table, and raw files beside it, one for each array."""
    with artifact.begin_files(shard) as out:
        with out.writing(f"{shard}.parquet") as file:
            pq.write_table(columns, file, compression="none", use_dictionary=False)
        for name, blocks in arrays.items():
            with out.writing(f"{shard}.{name}") as file:
                for block in blocks:
                    file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
        return out.commit(rows={Status.OK: len(columns)}, input_info={"digest": artifact.fingerprint})


def read_array(
    artifact: Artifact, shard: str, name: str, dtype: npt.DTypeLike, first: int = 0, count: int | None = None
) -> Array:
    """Numbers ``first`` to ``first + count`` of a raw file, by default all from ``first`` on."""
    size = np.dtype(dtype).itemsize
    with artifact.folder.open(f"{shard}.{name}") as file:
        file.seek(first * size)
        data = file.read() if count is None else file.read(count * size)
    if count is not None and len(data) != count * size:
        raise OSError(f"{artifact.url}/{shard}.{name}: ends before {first + count} numbers")
    return np.frombuffer(data, dtype=dtype)
