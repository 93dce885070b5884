"""Sidecars: a file for each shard, or the rows of a selection that came from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from capipe.errors import ArtifactMismatch
from capipe.manifests.artifact import Artifact
from capipe.manifests.joining.companion import companions_of
from capipe.manifests.schema import BASE, embedding
from capipe.manifests.shards import RowReader, expand, join

from ...stages.scored import foreign_shards

SELECTED = pa.schema([*BASE, pa.field("source_shard", pa.string()), pa.field("source_key", pa.string())])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return foreign_shards(tmp_path / "shards", [4, 3, 2], "{row:03d}")  # the same keys in each shard


def selection(shards: Path, out: Path, drop: int | None = None) -> Artifact:
    """A selection that packs the first two shards into one and renames their keys, without its ``drop``-th row."""
    artifact = Artifact.create(str(out), "select", {}, {"shards": str(shards)})
    sources = expand(str(shards))
    for name, packed in (("00000", sources[:2]), ("00001", sources[2:])):
        rows = [(shard.name, row) for shard in packed for row in RowReader(shard)]
        kept = [each for number, each in enumerate(rows) if name != "00000" or number != drop]
        with artifact.begin(name, SELECTED) as writer:
            for number, (source, row) in enumerate(kept):
                status = {"status": "filtered", "error": f"{source} {number}"} if number % 2 else {"status": "ok"}
                key = f"{source}_{row.key}"
                writer.write({"key": key, "uid": row.uid, **status, "source_shard": source, "source_key": row.key})
            entries = [{"name": shard.name, "digest": "d"} for shard in packed]
            writer.commit(rows_in=len(kept), input_info={"digest": "d", "shards": entries})
    artifact.close()
    return artifact


def test_rows_of_a_selection_are_joined_with_the_shards_that_it_selected_from(shards: Path, tmp_path: Path) -> None:
    joined = join(expand(str(shards)), {"marks": selection(shards, tmp_path / "selected")})
    seen = [[row.beside["marks"] for row in RowReader(shard)] for shard in joined]
    assert [[row["status"] for row in rows] for rows in seen] == [
        ["ok", "filtered", "ok", "filtered"],
        ["ok", "filtered", "ok"],
        ["ok", "filtered"],
    ]
    assert seen[1][1]["error"] == "00001 5" and seen[1][1]["key"] == "001"
    (companion,) = joined[1].companions
    assert companion.statuses() == ["ok", "filtered", "ok"] and companion.first() == ("000", seen[1][0]["uid"])
    with companion.open() as parquet:
        assert companion.table(parquet, ["key", "status"]).to_pylist()[1] == {"key": "001", "status": "filtered"}
    (narrowed,) = join(expand(str(shards / "00001.tar")), {"marks": Artifact.open(str(tmp_path / "selected"))})
    assert len(list(RowReader(narrowed))) == 3


def test_a_selection_that_lacks_a_row_is_refused(shards: Path, tmp_path: Path) -> None:
    joined = join(expand(str(shards)), {"marks": selection(shards, tmp_path / "selected", drop=5)})
    assert len(list(RowReader(joined[0]))) == 4
    with pytest.raises(ArtifactMismatch, match="row '001' expected, '002' found; it was not made of these shards"):
        list(RowReader(joined[1]))


def test_embeddings_are_arrays_and_a_missing_one_is_none(tmp_path: Path) -> None:
    vectors = [[0.5, 0.25, -1.0], None, [1.0, 0.0, 2.0]]
    artifact = Artifact.create(str(tmp_path / "out"), "embed", {}, {})
    with artifact.begin("00000", embedding(3, safety=True)) as writer:
        for number, vector in enumerate(vectors):
            status = "ok" if vector else "corrupt"
            unsafe = {"unsafe": 0.5, "unsafe_labels": ["X"]} if vector else {}
            writer.write({"key": f"{number}", "status": status, "image_embedding": vector, **unsafe})
        writer.commit(rows_in=3, input_info={"digest": "d"})
    artifact.close()
    rows = list(companions_of("embeddings", artifact)["00000"])
    assert rows[1]["image_embedding"] is None and rows[1]["unsafe"] is None
    for row, vector in zip(rows, vectors, strict=True):
        if vector is not None:
            assert isinstance(row["image_embedding"], np.ndarray) and row["image_embedding"].dtype == np.float16
            assert row["image_embedding"].tolist() == vector and row["unsafe_labels"] == ["X"]
