"""Embeddings beside the hashes: whose they are, which are of no use, what they add to the groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import BASE, EMBEDDING_COLUMN, embedding
from capipe.manifests.shards import expand
from capipe.stages.dedup.arrays import NONE, Indices
from capipe.stages.dedup.embeddings import reading
from capipe.stages.dedup.embeddings.forest import Vectors
from capipe.stages.dedup.embeddings.reading import (
    PART_BYTES,
    check_embeddings,
    check_same_space,
    parts_of_files,
    read_part,
    read_references,
)
from capipe.stages.dedup.hash_sets import HashSet, read_hash_set
from capipe.stages.dedup.marks import DedupConfig, find_marks, hash_shard

from ....conftest import photo
from ...embedded import embed
from ...vectors import searched
from ..test_marks import tars

WIDTH = 8


@pytest.fixture
def hashed(tmp_path: Path) -> HashSet:
    """Two shards: five pictures, one of them twice, and what is no picture."""
    pictures = [(f"{n}", photo(n)) for n in range(5)]
    shards = tars(tmp_path / "in", [*pictures, ("again", photo(1)), ("none", b"<html>")], 4)
    artifact = Artifact.create(str(tmp_path / "hashes"), "hash", {}, {})
    for shard in expand(str(shards)):
        hash_shard(shard, artifact)
    return read_hash_set(artifact, ["00000", "00001"])


def by_key(hashed: HashSet) -> dict[str, int]:
    names = [row["key"] for shard in hashed.shards for row in hashed.artifact.read_rows(shard)]
    return dict(zip(names, hashed.rows.tolist(), strict=True))


def unit(*axes: int) -> list[float]:
    return [float(axis in axes) for axis in range(WIDTH)]


def read(artifact: Artifact, hashed: HashSet) -> tuple[Indices, Vectors]:
    """All parts, one after another."""
    parts = [read_part(part, nodes) for part, nodes in parts_of_files(artifact, hashed, WIDTH)]
    nodes, vectors = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
    return nodes, vectors


def test_a_vector_for_every_file_but_those_of_no_use(
    hashed: HashSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    useless = {"2": [float("nan"), *unit(1)[1:]], "3": None, "4": [0.0] * WIDTH}
    vectors: dict[str, Any] = {"0": unit(0), "1": unit(1), "again": unit(1), "none": unit(7), **useless}
    artifact = embed(tmp_path / "e", hashed.artifact, vectors, WIDTH)
    file = by_key(hashed)
    for size in (1, PART_BYTES):  # a part for each shard, or one for both
        monkeypatch.setattr(reading, "PART_BYTES", size)
        nodes, numbers = read(artifact, hashed)
        assert set(nodes.tolist()) == {file["0"], file["1"]} and len(nodes) == (3 if size == 1 else 2)
        for key in "01":
            assert numbers[nodes.tolist().index(file[key])].tolist() == vectors[key]


def test_pictures_with_near_embeddings_are_one_group(hashed: HashSet, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the extra 'dedup' is not installed")
    near = [1.0, 0.2, *[0.0] * (WIDTH - 2)]  # a cosine of 0.98 with the first axis
    vectors = {"0": unit(0), "1": near, "again": near, "2": unit(2), "3": unit(3), "4": [float("nan")] * WIDTH}
    artifact = embed(tmp_path / "e", hashed.artifact, vectors, WIDTH)
    file = by_key(hashed)
    for cosine, joined in ((0.97, True), (0.99, False)):
        found = searched(tmp_path / f"{cosine}", hashed, artifact, cosine)
        marks = find_marks(hashed, None, DedupConfig(cosine=cosine), (NONE, NONE), found)
        assert (marks.keeper[file["0"]] == marks.keeper[file["1"]]) is np.bool_(joined)
        assert len(set(marks.keeper.tolist())) == (4 if joined else 5)
        assert np.flatnonzero(np.isnan(found.similar)).tolist() == [file["4"]]


def test_embeddings_of_other_images_are_refused(hashed: HashSet, tmp_path: Path) -> None:
    vectors = {key: unit(0) for key in by_key(hashed)}
    other = embed(tmp_path / "uid", hashed.artifact, vectors, WIDTH, uid=lambda uid: uid[::-1] if uid else None)
    with pytest.raises(ArtifactMismatch, match=r"uid '.*' expected, '.*' found; .* --shards"):
        read(other, hashed)
    short = embed(tmp_path / "short", hashed.artifact, vectors, WIDTH, rows=2)
    with pytest.raises(ArtifactMismatch, match=r"2 rows for 4"):
        read(short, hashed)


def test_references_are_images_by_uid_with_their_lowest_name(hashed: HashSet, tmp_path: Path) -> None:
    vectors = {key: unit(0) for key in by_key(hashed)}
    artifacts = [embed(tmp_path / name, hashed.artifact, vectors, WIDTH) for name in "ba"]
    references = read_references(artifacts)
    assert references.count == 6 and len(references.rows) == 14  # five pictures and what is none, which has bytes
    file = by_key(hashed)
    image = dict(zip([*file, *file], references.rows.tolist(), strict=True))
    assert image["1"] == image["again"] != image["0"]
    names = references.names(np.array([image["1"], image["4"]]))
    assert names == {image["1"]: f"{tmp_path}/a/00000: 1", image["4"]: f"{tmp_path}/a/00001: 4"}


def test_what_cannot_be_compared_is_refused(hashed: HashSet, tmp_path: Path) -> None:
    vectors = {key: unit(0) for key in by_key(hashed)}
    ours = embed(tmp_path / "ours", hashed.artifact, vectors, WIDTH, scorers={"clip": {"model": "a"}})
    wider = {key: [*unit(0), 0.0] for key in vectors}
    wide = embed(tmp_path / "wide", hashed.artifact, wider, WIDTH + 1, scorers={"clip": {"model": "a"}})
    with pytest.raises(BadInput, match=r"wide: embeddings of 9 numbers, but .*ours has 8; .*--clip"):
        check_same_space(ours, WIDTH, wide)
    tower = embed(tmp_path / "tower", hashed.artifact, vectors, WIDTH, scorers={"clip": {"model": "b"}})
    with pytest.raises(BadInput, match=r"tower: embeddings by another tower .* than .*ours; .*--clip"):
        check_same_space(ours, WIDTH, tower)
    check_same_space(
        ours, WIDTH, embed(tmp_path / "same", hashed.artifact, vectors, WIDTH, scorers={"clip": {"model": "a"}})
    )
    empty = Artifact.create(str(tmp_path / "empty"), "embed", {}, {})
    with pytest.raises(BadInput, match="no shard is committed there yet"):
        check_same_space(ours, WIDTH, empty)
    empty.close()


def test_what_is_no_set_of_embeddings_is_refused(hashed: HashSet, tmp_path: Path) -> None:
    vectors = {key: unit(0) for key in by_key(hashed)}
    one = embed(tmp_path / "one", hashed.artifact, vectors, WIDTH, shards=["00000"])
    with pytest.raises(BadInput, match="no embeddings of shard 00001"):
        check_embeddings(one, hashed.shards)
    with pytest.raises(ArtifactMismatch, match=f"{EMBEDDING_COLUMN}' is missing"):
        check_embeddings(hashed.artifact, hashed.shards)
    lists = pa.schema([*BASE, pa.field(EMBEDDING_COLUMN, pa.list_(pa.float16()))])
    ragged = embed(tmp_path / "ragged", hashed.artifact, vectors, WIDTH, schema=lists)
    with pytest.raises(ArtifactMismatch, match="not a fixed_size_list<float16>"):
        check_embeddings(ragged, hashed.shards)
    wide = pa.schema([*BASE, pa.field(EMBEDDING_COLUMN, pa.list_(pa.float32(), WIDTH))])
    single = embed(tmp_path / "single", hashed.artifact, vectors, WIDTH, schema=wide)
    with pytest.raises(ArtifactMismatch, match="expected fixed_size_list"):
        check_embeddings(single, hashed.shards)
    mixed = embed(tmp_path / "mixed", hashed.artifact, vectors, WIDTH, shards=["00000"])
    longer = {key: [*unit(0), 0.0] for key in vectors}
    embed(tmp_path / "mixed", hashed.artifact, longer, WIDTH + 1, shards=["00001"])
    with pytest.raises(ArtifactMismatch, match="embeddings of 8 and of 9 numbers"):
        check_embeddings(mixed, hashed.shards)
    assert embedding(WIDTH).field(EMBEDDING_COLUMN).type.list_size == WIDTH
