"""``--shard-size`` of an export: the same rows in other shards, each with at most so many pairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.allowed import Allowed
from capipe.manifests.shards import uid_of
from capipe.manifests.verify import verify
from capipe.pipeline.inspect.images import RowImages
from capipe.pipeline.inspect.shard_join import ShardJoin, ShardName
from capipe.stages.export.formats import FORMATS
from capipe.stages.filter.select import STAGE

from ..exporting import VERSIONED, captioned, export, final_shards, rows_of, table_of
from .test_formats import tar_images


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the one that holds times and the lock, a manifest's lines in order."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("times.jsonl", "lock") and path.parent.name not in VERSIONED:
            data = path.read_bytes()
            name = str(path.relative_to(folder))
            found[name] = b"".join(sorted(data.splitlines())) if path.name == "manifest.jsonl" else data
    return found


def pairs_of(out: Path) -> list[int]:
    return [record.rows.get("ok", 0) for record in Artifact.open(str(out)).committed().values()]


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize(("size", "expected"), [(3, [2, 3, 3, 2, 3, 3]), (8, [8, 8]), (100, [16])])
def test_rows_are_those_of_the_source(tmp_path: Path, format: str, size: int, expected: list[int]) -> None:
    source = final_shards(tmp_path / "final", shards=3, formats=("jpg", "png"), empty=(1,))
    out = tmp_path / "out"
    export(source, out, format, shard_size=size)
    assert pairs_of(out) == expected
    assert rows_of(out) == rows_of(source)
    assert verify(str(out)).faults == [] and verify(str(out)).notes == []
    for shard in Artifact.open(str(out)).committed():
        stats, rows = json.loads((out / f"{shard}_stats.json").read_bytes()), pq.read_table(out / f"{shard}.parquet")
        assert stats["count"] == len(rows) and sum(stats["status_dict"].values()) == len(rows)
    match format:
        case "webdataset":
            sizes = json.loads((out / "sizes.json").read_bytes())
            assert list(sizes.values()) == expected
            assert {k: d for k, (_, d) in tar_images(out).items()} == {k: d for k, (_, d) in tar_images(source).items()}
        case "parquet":
            assert [pq.ParquetFile(path).metadata.num_rows for path in sorted((out / "data").iterdir())] == expected
        case "lance":
            assert len(table_of(out)) == 16
        case "llava":
            assert len(json.loads((out / "llava.json").read_bytes())) == 16
        case "folder":
            assert [len(list(path.glob("*.txt"))) for path in sorted((out / "images").iterdir())] == expected
        case "messages":
            assert len((out / "messages.jsonl").read_text().splitlines()) == 16


def test_whatever_shards_it_comes_from_it_is_the_same(tmp_path: Path) -> None:
    """Cut up and put together again, or cut otherwise: the tars' samples, the loose files and Parquet are equal."""
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "small", shard_size=3)
    export(source, tmp_path / "whole", shard_size=16)
    export(tmp_path / "small", tmp_path / "again", shard_size=16)
    assert (tmp_path / "again/00000.tar").read_bytes() == (tmp_path / "whole/00000.tar").read_bytes()
    assert rows_of(tmp_path / "again") == rows_of(source)
    assert verify(str(tmp_path / "again")).faults == []


@pytest.mark.parametrize("format", list(FORMATS))
def test_shards_that_a_kill_left_undone_are_made_alone(tmp_path: Path, format: str) -> None:
    """A kill between two commits of one task: some of a source shard's parts are there, others are not."""
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "alone", format, shard_size=3)
    export(source, tmp_path / "out", format, shard_size=3)
    manifest = tmp_path / "out/_capipe/manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    manifest.write_bytes(b"".join(line for line in lines if json.loads(line)["shard"] not in ("00001", "00005")))
    (tmp_path / "out/00001.parquet").unlink()
    stamp = (tmp_path / "out/00002.parquet").stat().st_mtime_ns
    export(source, tmp_path / "out", format, shard_size=3)
    assert files(tmp_path / "out") == files(tmp_path / "alone")
    assert (tmp_path / "out/00002.parquet").stat().st_mtime_ns == stamp


def test_another_size_is_another_configuration(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out", shard_size=3)
    with pytest.raises(ArtifactMismatch, match="shard_size"):
        export(source, tmp_path / "out", shard_size=4)
    with pytest.raises(ArtifactMismatch, match="shard_size"):
        export(source, tmp_path / "out")
    export(source, tmp_path / "plain")
    semantic = Artifact.open(str(tmp_path / "plain")).config["semantic"]
    assert "shard_size" not in semantic["export"]  # fingerprints of older exports stay what they were


def test_a_source_that_changed_is_noticed(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out", shard_size=3)
    shutil.rmtree(source)
    final_shards(source, caption=lambda index, text: text + " again")
    with pytest.raises(ArtifactMismatch, match=r"shard 00000 of .* changed since this export was made"):
        export(source, tmp_path / "out", shard_size=3)


def test_a_source_that_moved_is_the_same(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out", shard_size=3)
    before = (tmp_path / "out/_capipe/manifest.jsonl").read_bytes()
    source.rename(tmp_path / "moved")
    export(tmp_path / "moved", tmp_path / "out", shard_size=3)
    assert (tmp_path / "out/_capipe/manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["00001.tar", "00001.parquet"])
def test_damage_is_found_before_anything_of_the_shard_is_committed(tmp_path: Path, name: str) -> None:
    source = final_shards(tmp_path / "final")
    data = bytearray((source / name).read_bytes())
    data[len(data) // 2 if name.endswith("tar") else 6] ^= 1
    (source / name).write_bytes(data)
    if name.endswith("parquet"):  # listings are looked at first
        with pytest.raises(ArtifactMismatch, match="00001"):
            export(source, tmp_path / "out", "parquet", shard_size=3)
        assert not (tmp_path / "out").exists()
        return
    assert export(source, tmp_path / "out", "parquet", shard_size=3) is None
    out = Artifact.open(str(tmp_path / "out"))
    assert list(out.committed()) == ["00000", "00001", "00002"] and "00001.tar" in out.quarantined()["00003"]


def test_what_cannot_be_put_together(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", key=lambda shard, index: f"k{index}")
    with pytest.raises(BadInput, match=r"key 'k0' is in shard 00000 and in 00001; --shard-size needs unique keys"):
        export(source, tmp_path / "out", "parquet", shard_size=100)
    one = final_shards(tmp_path / "one")
    with pytest.raises(BadInput, match="--link: tars are written anew"):
        export(one, tmp_path / "out", shard_size=3, link=True)
    assert not (tmp_path / "out").exists()


def test_tars_of_another_tool(tmp_path: Path) -> None:
    export(captioned(tmp_path / "captions", 8), tmp_path / "out", shard_size=3)
    assert pairs_of(tmp_path / "out") == [2, 3, 3]
    assert verify(str(tmp_path / "out")).faults == []


def test_verify_compares_rows_with_where_they_come_from(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out", shard_size=3)
    config = tmp_path / "final/_capipe"
    other = final_shards(tmp_path / "other", key=lambda shard, index: f"other-{shard}-{index}")
    for path in other.glob("0*.parquet"):
        (source / path.name).write_bytes(path.read_bytes())
    assert config.exists() and Artifact.open(str(source)).stage == STAGE
    faults = verify(str(tmp_path / "out")).faults
    assert len(faults) == 6 and all("not those of its input" in fault for fault in faults)


def test_workers_share_the_tasks(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", shards=4)
    options: dict[str, Any] = {"shard_size": 5}
    export(source, tmp_path / "one", **options)
    export(source, tmp_path / "two", workers=2, **options)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("format", list(FORMATS))
def test_the_viewer_finds_the_pictures(tmp_path: Path, format: str) -> None:
    """Of exports without tars in the source's, whose shards of the same names have other rows."""
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out", format, shard_size=3)
    found = {name: Artifact.open(str(tmp_path / name)) for name in ("final", "out")}
    for join in (ShardJoin(found), ShardJoin({"out": found["out"]})):
        pictures = RowImages(Allowed(str(tmp_path)))
        for shard in join.records["out"]:
            place = ShardName("out", shard)
            assert join.beside(place) == []
            for row in found["out"].read_rows(shard):
                data = pictures.of(join, place, row)
                assert (data and uid_of(data)) == (row["uid"] if row["status"] == "ok" else None)
