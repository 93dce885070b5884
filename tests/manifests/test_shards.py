"""From a pattern to rows: whoever wrote the tars, every sample is a row."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import INGEST
from capipe.manifests.shards import InputShard, Row, RowReader, expand, uid_of
from capipe.manifests.status import Status

from ..conftest import photo, tar_bytes

MakeTar = Callable[..., Path]


def rows_of(path: Path) -> list[Row]:
    return list(RowReader(InputShard(path.stem, str(path))))


def test_img2dataset_layout(make_tar: MakeTar) -> None:
    image = photo(0)
    meta = {"url": "u", "caption": "a cat"}
    path = make_tar({"000000000.jpg": image, "000000000.json": json.dumps(meta).encode(), "000000000.txt": b"a cat"})
    (row,) = rows_of(path)
    assert (row.key, row.uid, row.text, row.meta, row.image) == ("000000000", uid_of(image), "a cat", meta, image)
    assert row.status is Status.OK and row.error is None


def test_tar_of_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "x.tar"
    with tarfile.open(out, "w") as tar:
        for name in ("./pics/a.JPG", "./pics/sub/b.png"):
            data = photo(1)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [(row.key, row.format, row.status) for row in rows_of(out)] == [
        ("pics/a", "jpg", Status.OK),
        ("pics/sub/b", "png", Status.OK),
    ]


def test_bad_text_and_metadata_are_noted_without_losing_the_image(make_tar: MakeTar) -> None:
    path = make_tar({"a.jpg": photo(0), "a.txt": b"caf\xe9", "a.json": b"[1, 2]", "b.jpg": photo(1), "b.json": b"{"})
    first, second = rows_of(path)
    assert first.status is Status.OK and first.text == "caf�" and first.meta is None
    assert first.error == "txt is not UTF-8 (byte 3): replaced; json is a list, not an object: left out"
    assert second.status is Status.OK and second.error == "json is unreadable: left out"


def test_what_breaks_the_grouping_is_a_row_with_a_reason(make_tar: MakeTar) -> None:
    members = [
        ("a.jpg", photo(0)),
        ("a.txt", b"x"),
        ("b.txt", b"alone"),
        ("a.jpg", photo(1)),
        ("c.jpg", photo(2)),
        ("c.jpg", photo(3)),
        ("../d.jpg", photo(4)),
        ("noext", b""),
        ("e.left.jpg", photo(5)),
        ("e.right.jpg", photo(6)),
    ]
    rows = rows_of(make_tar(members))
    assert [(row.key, str(row.status)) for row in rows] == [
        ("a", "ok"),
        ("b", "unsupported"),
        ("a~2", "duplicate"),
        ("c", "ok"),
        ("c~2", "duplicate"),
        (rows[5].key, "unsupported"),
        (rows[6].key, "unsupported"),
        ("e", "unsupported"),
    ]
    assert len({row.key for row in rows}) == len(rows)
    assert all(row.error for row in rows if row.status is not Status.OK)
    assert "no image" in str(rows[1].error) and "climbs" in str(rows[5].error)


def test_repeated_images_are_rows_with_one_uid(make_tar: MakeTar) -> None:
    first, second = rows_of(make_tar({"a.jpg": photo(0), "b.jpg": photo(0)}))
    assert first.uid == second.uid and first.key != second.key


def test_a_truncated_tar_keeps_what_is_whole(make_tar: MakeTar) -> None:
    path = make_tar({f"{i}.jpg": photo(i) for i in range(4)})
    path.write_bytes(path.read_bytes()[: -(10240 + 600)])
    rows = rows_of(path)
    assert [row.status for row in rows[:-1]] == [Status.OK] * (len(rows) - 1)
    assert rows[-1].status is Status.CORRUPT and "ends" in str(rows[-1].error)


def test_patterns(tmp_path: Path, make_tar: MakeTar) -> None:
    for i in range(3):
        make_tar({"a.jpg": photo(i)}, f"in/{i:05}.tar")
    folder = tmp_path / "in"
    expected = ["00000", "00001", "00002"]
    for pattern in (folder, f"{folder}/*.tar", f"{folder}/{{00000..00002}}.tar", f"file://{folder}"):
        assert [shard.name for shard in expand(str(pattern))] == expected
    assert [shard.name for shard in expand(f"{folder}/00001.tar")] == ["00001"]
    assert [shard.name for shard in expand(f"{folder}/0000{{0,2}}.tar")] == ["00000", "00002"]


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        ("{00000..00001}.tar", "no such shard"),
        ("nowhere", "no such file"),
        ("*.tar", "no .tar"),
        ("{3..1}.tar", "back"),
    ],
)
def test_bad_patterns_name_the_mend(tmp_path: Path, make_tar: MakeTar, pattern: str, word: str) -> None:
    make_tar({"a.jpg": photo(0)}, "sub/00000.tar")
    with pytest.raises(BadInput, match=word):
        expand(str(tmp_path / ("sub/" if "{0" in pattern else "") / pattern))


def test_two_shards_of_one_name_are_refused(tmp_path: Path, make_tar: MakeTar) -> None:
    make_tar({"a.jpg": photo(0)}, "x/00000.tar")
    make_tar({"a.jpg": photo(0)}, "y/00000.tar")
    with pytest.raises(BadInput, match="share a name"):
        expand(f"{tmp_path}/{{x,y}}/*.tar")


def ingested(out: Path) -> Artifact:
    """An artifact with one ok row, one corrupt row and another ok row."""
    artifact = Artifact.create(str(out), "ingest", {}, {"shards_total": 1})
    with artifact.begin("00000", INGEST, tar=True) as shard:
        for i, status in enumerate(["ok", "corrupt", "ok"]):
            image = photo(i)
            row = {"key": f"{i}", "uid": uid_of(image), "status": status, "error": None if status == "ok" else "bad"}
            shard.write({**row, "text": f"t{i}"}, {"jpg": image, "txt": b"t"} if status == "ok" else None)
        shard.commit(rows_in=3, input_info={"digest": "d"})
    artifact.close()
    return artifact


def test_an_artifact_gives_its_own_rows_failures_included(tmp_path: Path) -> None:
    ingested(tmp_path / "shards")
    (shard,) = expand(str(tmp_path / "shards"))
    reader = RowReader(shard)
    rows = list(reader)
    assert [(row.key, str(row.status), row.text) for row in rows] == [
        ("0", "ok", "t0"),
        ("1", "corrupt", None),
        ("2", "ok", "t2"),
    ]
    assert rows[1].image is None and rows[1].error == "bad"
    assert shard.record is not None and reader.info["digest"] == shard.record.files["00000.tar"]["sha256"]


def test_an_artifact_whose_tar_does_not_fit_its_parquet_is_refused(tmp_path: Path) -> None:
    ingested(tmp_path / "shards")
    tar = tmp_path / "shards/00000.tar"
    whole = tar.read_bytes()
    for damaged in (whole[:2000], tar_bytes({"0.jpg": photo(9), "2.jpg": photo(2)}), whole + b"tail"):
        tar.write_bytes(damaged)
        with pytest.raises(ArtifactMismatch, match=r"00000\.tar"):
            list(RowReader(expand(str(tmp_path / "shards"))[0]))
