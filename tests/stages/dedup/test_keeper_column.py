"""Columns by which keepers are chosen: the highest value of each file's rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import BASE
from capipe.stages.dedup.keeper_column import check_column, read_column

from ..vectors import embedded_files

COLUMNS = [pa.field("score", pa.float32()), pa.field("many", pa.int64()), pa.field("name", pa.string())]


def test_the_highest_of_several_rows_counts_and_missing_ones_do_not(tmp_path: Path) -> None:
    uids = [f"{number:032x}" for number in (3, 1, 3, 2, 0, 1)]
    hashed, _, file = embedded_files(tmp_path, np.ones((6, 2), dtype=np.float16), 4, uids=uids)
    artifact = Artifact.create(str(tmp_path / "scores"), "score", {}, {})
    values = iter([0.1, float("nan"), 0.7, None, -5.0, 2.0])
    for shard in hashed.shards:
        rows = hashed.artifact.read_rows(shard)
        with artifact.begin(shard, pa.schema([*BASE, *COLUMNS])) as out:
            for row in rows:
                base = {name: row[name] for name in ("key", "uid", "status", "error")}
                out.write({**base, "score": next(values), "many": 1 << 40, "name": "x"})
            out.commit(rows_in=len(rows), input_info={"digest": shard})
    check_column(artifact, hashed.shards, "score")
    found = read_column(artifact, hashed, "score")
    assert file.tolist() == [3, 1, 3, 2, 0, 1]
    assert np.allclose(found, [-5.0, 2.0, np.nan, 0.7], equal_nan=True)
    assert read_column(artifact, hashed, "many").tolist() == [1 << 40] * 4
    with pytest.raises(BadInput, match=r"no column 'name' of numbers for --keeper; it has score, many"):
        check_column(artifact, hashed.shards, "name")
    with pytest.raises(BadInput, match="has no shard 00009"):
        check_column(artifact, ["00009"], "score")
    artifact.close()
    other, _, _ = embedded_files(tmp_path / "other", np.ones((6, 2), dtype=np.float16), 4, uids=uids[::-1])
    with pytest.raises(ArtifactMismatch, match="its rows are not those of the images"):
        read_column(artifact, other, "score")
