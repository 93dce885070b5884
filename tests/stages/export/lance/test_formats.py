"""A Lance table of images that were encoded anew: what is stored, what it was, and captions of the originals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from capipe.errors import BadInput
from capipe.manifests.withdrawal.absent import prove_absent
from capipe.manifests.withdrawal.uid_set import UidSet
from capipe.pipeline.inspect.verify import verify
from capipe.stages.export.lance.schema import table_schema

from ....conftest import photo
from ...exporting import captions_of, export, rows_of, table_of, text_of
from ...ingesting import fill, ingest, members

FILES = {"a.jpg": photo(1), "b.bmp": photo(2, fmt="BMP"), "c.gif": photo(3, fmt="GIF"), "d.png": photo(4, fmt="PNG")}
FILES |= {"e.avif": photo(5, fmt="AVIF"), "f.tif": photo(6, fmt="TIFF")}
ANEW = ("b.bmp", "c.gif", "e.avif", "f.tif")


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of six images in six formats, their bytes kept."""
    folder = tmp_path_factory.mktemp("crawl")
    fill(folder / "in", {**FILES, **{f"{name[0]}.txt": name.encode() for name in FILES}})
    ingest(folder / "in", out=folder / "shards", accept=("bmp", "gif", "avif", "tiff"), shard_size=3)
    return folder / "shards"


@pytest.mark.parametrize("size", [None, 4, 100])
def test_the_table_has_the_bytes_of_the_tars_and_says_what_they_were(
    crawl: Path, tmp_path: Path, size: int | None
) -> None:
    export(crawl, tmp_path / "out", "lance", transcode="jpeg", shard_size=size)
    export(crawl, tmp_path / "tars", transcode="jpeg", image_extension="keep", shard_size=size)
    stored, before = members(tmp_path / "tars"), {row["text"]: row for row in rows_of(crawl)}
    table = table_of(tmp_path / "out")
    rows = table.to_pylist()
    assert [row["caption"] for row in rows] == list(FILES)
    for row in rows:
        name, source = row["caption"], before[row["caption"]]
        assert row["image"] == stored[f"{row['key']}.{row['format']}"]
        assert row["uid"] == row["sha256"][:32] == hashlib.sha256(row["image"]).hexdigest()[:32]
        assert (row["source_uid"], row["width"], row["height"]) == (source["uid"], 96, 64)
        if name in ANEW:
            was = hashlib.sha256(FILES[name]).hexdigest(), source["format"]
            assert (row["original_sha256"], row["original_format"], row["format"]) == (*was, "jpg")
        else:
            assert row["image"] == FILES[name] and row["original_sha256"] is row["original_format"] is None
    listed = {*rows_of(tmp_path / "out")[0]}
    assert set(table.schema.names) == {*listed, "image", "caption", "json", "url"} - {"status", "error"}
    assert verify(str(tmp_path / "out")).faults == []


def test_what_ingest_encoded_anew_is_exported_as_it_is(crawl: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    ingest(crawl.parent / "in", out=made, accept=("bmp", "gif", "avif", "tiff"), transcode="png")
    export(made, tmp_path / "out", "lance")
    rows, stored = table_of(tmp_path / "out").to_pylist(), members(made)
    assert {row["image"] for row in rows} == {data for name, data in stored.items() if name.endswith(("png", "jpg"))}
    assert {row["caption"] for row in rows if row["original_sha256"] is not None} == {*ANEW}
    assert "source_uid" not in rows[0]


@pytest.mark.parametrize("size", [None, 4])
def test_captions_of_the_originals_are_appended(crawl: Path, tmp_path: Path, size: int | None) -> None:
    out, options = tmp_path / "out", {"transcode": "webp", "shard_size": size}
    export(crawl, out, "lance", **options)
    before = {path: path.stat().st_ino for path in (out / "train.lance/data").iterdir()}
    captions = captions_of(crawl, tmp_path / "captions")
    assert export(crawl, out, "lance", captions=[str(captions)], **options) is not None
    table = table_of(out)
    texts = dict(zip(table["key"].to_pylist(), table["caption_dense"].to_pylist(), strict=True))
    assert texts == {row["key"]: text_of("dense", row["key"]) for row in rows_of(crawl)}
    assert before == {path: path.stat().st_ino for path in before} and verify(str(out)).faults == []
    export(crawl, tmp_path / "at-once", "lance", captions=[str(captions)], **options)
    assert table_of(tmp_path / "at-once").equals(table, check_metadata=True)


def test_captions_of_other_images_are_not(crawl: Path, tmp_path: Path) -> None:
    rows: dict[str, list[tuple[str, str | None]]] = {f"{number:05d}": [] for number in range(2)}
    for row in rows_of(crawl):
        rows[row["key"][:5]].append((row["key"], "f" * 32 if row["text"] == "e.avif" else row["uid"]))
    captions = captions_of(crawl, tmp_path / "captions", shards=rows)
    avif = hashlib.sha256(FILES["e.avif"]).hexdigest()[:32]
    with pytest.raises(BadInput, match=f"'000011' of shard 00001 is another image there \\(f+, not {avif}\\)"):
        export(crawl, tmp_path / "out", "lance", captions=[str(captions)], transcode="png")


def test_a_column_of_captions_is_not_called_like_one_about_the_originals(crawl: Path, tmp_path: Path) -> None:
    captions = captions_of(crawl, tmp_path / "captions", prompts=("uid",))
    named = [f"source={captions}"]
    with pytest.raises(BadInput, match="column source_uid of caption 'uid' is there already"):
        export(crawl, tmp_path / "out", "lance", captions=named, transcode="png")
    assert "source_uid" in table_schema(pa.schema([("source_uid", pa.string())])).names


def test_images_with_appended_captions_are_withdrawn_by_either_uid(crawl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"transcode": "png", "captions": [str(captions_of(crawl, tmp_path / "captions"))]}
    export(crawl, out, "lance", **options)
    rows = {row["text"]: row for row in rows_of(out)}
    listed = [rows["b.bmp"]["source_uid"], rows["e.avif"]["uid"], rows["a.jpg"]["uid"]]
    assert prove_absent(str(out), UidSet.of(listed)).faults != []
    export(crawl, out, "lance", drop=UidSet.of(listed), **options)
    table = table_of(out)
    left = ["c.gif", "d.png", "f.tif"]
    assert table["caption"].to_pylist() == left
    assert table["caption_dense"].to_pylist() == [text_of("dense", rows[name]["key"]) for name in left]
    report = prove_absent(str(out), UidSet.of(listed))
    assert report.faults == [] and verify(str(out)).faults == []
