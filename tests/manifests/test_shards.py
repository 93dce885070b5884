"""From a pattern to rows: whoever wrote the tars, every sample is a row."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.joining.companion import companions_of
from capipe.manifests.manifest import ShardRecord
from capipe.manifests.schema import BASE, INGEST
from capipe.manifests.shards import InputShard, Row, RowReader, expand, join, uid_of
from capipe.manifests.status import Status
from capipe.stages.ingest.source_refs import Handles
from capipe.stages.ingest.sources import open_sources

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
    assert first.error == "text is not UTF-8: replaced; json is a list, not an object: left out"
    assert second.status is Status.OK and second.error == "json is unreadable: left out"


def test_captions_are_found_as_ingest_finds_them(make_tar: MakeTar) -> None:
    path = make_tar(
        {
            "a.jpg": photo(0),
            "a.json": b'{"caption": "json cap"}',
            "b.image.jpg": photo(1),
            "b.caption.txt": b"dotted",
            "c.jpg": photo(2),
            "c.TXT": b"\xef\xbb\xbfmarked",
            "c.json": b'{"caption": "not this"}',
            "c.meta.json": b"{}",
            "caf\u00e9.jpg": photo(3),
            "cafe\u0301.txt": b"of macOS",
        }
    )
    rows = rows_of(path)
    assert [row.text for row in rows] == ["json cap", "dotted", "marked", "of macOS"]
    assert [row.text for row in rows] == [item.load(Handles()).text for item in open_sources([str(path)])]
    assert [row.error for row in rows] == [None, None, "members not read: meta.json", None]
    assert rows[0].meta == {"caption": "json cap"}


def test_any_name_is_read_and_its_key_is_fit_for_a_table(make_tar: MakeTar) -> None:
    names = ["Screenshot 9.41\u202fAM", "a\xa0b", "a\u3000b", "\U0001f468\u200d\U0001f469", "a\tb", "a\nb"]
    rows = rows_of(make_tar({f"{name}.jpg": photo(n) for n, name in enumerate(names)}))
    assert [row.status for row in rows] == [Status.OK] * 6
    assert [row.key for row in rows] == ["Screenshot 9", *names[1:4], "a\\tb", "a\\nb"]


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


NOTED = pa.schema([*BASE, pa.field("note", pa.string())])
IMAGES = [(f"{i}", uid_of(photo(i))) for i in range(3)]  # the rows of `ingested`


def noted(out: Path, rows: Sequence[tuple[str, str]] = IMAGES, shard: str = "00000") -> Artifact:
    """A sidecar that has a note for each of ``rows`` (key, uid)."""
    artifact = Artifact.create(str(out), "note", {"out": out.name}, {})
    with artifact.begin(shard, NOTED) as transaction:
        for key, uid in rows:
            transaction.write({"key": key, "uid": uid, "status": "ok", "error": None, "note": f"{out.name} {key}"})
        transaction.commit(rows_in=len(rows), input_info={"digest": "d"})
    artifact.close()
    return artifact


def joined(tmp_path: Path, artifacts: Mapping[str, Artifact]) -> InputShard:
    if not (tmp_path / "shards").exists():
        ingested(tmp_path / "shards")
    (shard,) = join(expand(str(tmp_path / "shards")), artifacts)
    return shard


def test_joined_rows_have_those_of_every_sidecar_beside_them(tmp_path: Path) -> None:
    one, other = noted(tmp_path / "one"), noted(tmp_path / "other")
    reader = RowReader(joined(tmp_path, {"first": one, "second": other}))
    rows = list(reader)
    assert [row.beside["first"]["note"] for row in rows] == ["one 0", "one 1", "one 2"]
    assert [row.beside["second"]["note"] for row in rows] == ["other 0", "other 1", "other 2"]
    assert all(set(row.beside) == {"first", "second"} for row in rows)
    assert [str(row.status) for row in rows] == ["ok", "corrupt", "ok"] and rows[0].image == photo(0)
    digests = {
        name: hashlib.sha256((tmp_path / folder / "00000.parquet").read_bytes()).hexdigest()
        for name, folder in (("first", "one"), ("second", "other"))
    }
    assert reader.info["companions"] == digests
    whole = hashlib.sha256((tmp_path / "shards/00000.tar").read_bytes()).hexdigest()
    assert reader.info["digest"] == whole


def test_a_foreign_tar_can_be_joined_by_its_name(tmp_path: Path, make_tar: MakeTar) -> None:
    path = make_tar({f"{i}.jpg": photo(i) for i in range(3)})
    (shard,) = join(expand(str(path)), {"notes": noted(tmp_path / "notes")})
    assert [row.beside["notes"]["note"] for row in RowReader(shard)] == ["notes 0", "notes 1", "notes 2"]


def test_without_sidecars_nothing_changes(tmp_path: Path) -> None:
    shard = joined(tmp_path, {})
    assert [shard] == expand(str(tmp_path / "shards"))
    reader = RowReader(shard)
    assert [row.beside for row in reader] == [{}, {}, {}]
    assert set(reader.info) == {"url", "digest", "bytes", "rows"}
    assert not shard.has_repaired_companions(made_of({"digest": "d"}))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([IMAGES[0], IMAGES[2], IMAGES[1]], "row '1' expected, '2' found"),
        ([IMAGES[0], ("1", IMAGES[2][1]), IMAGES[2]], "row '1' expected, '1' of another image found"),
        (IMAGES[:2], "row '2' expected, nothing found"),
        ([], "row '0' expected, nothing found"),
        ([*IMAGES, ("3", uid_of(photo(3)))], "has more rows than its shard"),
    ],
    ids=["another order", "another image", "too few", "none", "too many"],
)
def test_a_sidecar_of_other_images_is_refused(tmp_path: Path, rows: list[tuple[str, str]], reason: str) -> None:
    """While it is read; most of it is refused before that, at the start."""
    shard = joined(tmp_path, {"right": noted(tmp_path / "right")})
    notes = companions_of("notes", noted(tmp_path / "notes", rows))["00000"]
    shard = replace(shard, companions=(*shard.companions, notes))
    with pytest.raises(ArtifactMismatch) as caught:
        list(RowReader(shard))
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/notes/00000.parquet: ") and reason in line
    assert "give --shards those it was made of" in line and "\n" not in line


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("0", IMAGES[1][1]), IMAGES[1], IMAGES[2]], "row '0' expected, '0' of another image found"),
        ([IMAGES[1], IMAGES[0], IMAGES[2]], "row '0' expected, '1' found"),
        (IMAGES[:2], "2 rows, and 3 in "),
        ([*IMAGES, ("3", uid_of(photo(3)))], "4 rows, and 3 in "),
    ],
)
def test_a_sidecar_of_other_images_is_refused_at_the_start(
    tmp_path: Path, rows: list[tuple[str, str]], reason: str
) -> None:
    with pytest.raises(ArtifactMismatch) as caught:
        joined(tmp_path, {"right": noted(tmp_path / "right"), "notes": noted(tmp_path / "notes", rows)})
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/notes/00000.parquet: {reason}") and "\n" not in line


def test_a_sidecar_without_the_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no shard 00000 .*finish its run, or narrow --shards") as caught:
        joined(tmp_path, {"notes": noted(tmp_path / "notes", shard="00001")})
    assert str(caught.value).startswith(f"{tmp_path}/notes: ") and "\n" not in str(caught.value)


def made_of(info: Mapping[str, object]) -> ShardRecord:
    return ShardRecord("00000", {"ok": 3}, {}, info, "f")


def test_another_sidecar_than_the_output_was_made_of_is_noticed(tmp_path: Path) -> None:
    shard = joined(tmp_path, {"notes": noted(tmp_path / "notes")})
    reader = RowReader(shard)
    list(reader)
    made = made_of(reader.info)
    assert not shard.has_repaired_companions(made)
    (companion,) = shard.companions
    changed = InputShard(shard.name, shard.url, shard.record, (replace(companion, sha256="0" * 64),))
    renewed = joined(tmp_path, {"notes": noted(tmp_path / "renewed")})
    for other, output in ((changed, made), (renewed, made), (shard, made_of({"digest": "d"}))):
        with pytest.raises(ArtifactMismatch, match=r"00000\.parquet: changed since this output was made; use another"):
            other.has_repaired_companions(output)
