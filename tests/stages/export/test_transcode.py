"""Images that readers do not decode: refused at the start, or encoded anew under a uid of their own."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.samples import read_samples
from capipe.manifests.shards import RowReader, expand
from capipe.manifests.verify import verify
from capipe.manifests.withdrawal.absent import prove_absent
from capipe.manifests.withdrawal.uid_set import UidSet
from capipe.pipeline.jobs import export_images
from capipe.stages.export.formats import FORMATS
from capipe.stages.export.parquet import TrainingParquet

from ...conftest import photo
from ...models.images.test_further_formats import shown
from ...models.images.test_icc import apart
from ..exporting import export, rows_of
from ..ingesting import fill, ingest

FILES = {"a.jpg": photo(1), "b.bmp": photo(2, fmt="BMP"), "c.gif": photo(3, fmt="GIF"), "d.png": photo(4, fmt="PNG")}
FILES |= {"e.avif": photo(5, fmt="AVIF"), "f.tif": photo(6, fmt="TIFF")}
ANEW = ("b.bmp", "c.gif", "e.avif", "f.tif")


class Archive(TrainingParquet):
    """An export of a user's own, whose readers decode all formats."""

    images = ("jpg", "png", "webp", "bmp", "gif", "avif", "tiff")


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of six images in six formats, their bytes kept."""
    folder = tmp_path_factory.mktemp("crawl")
    fill(folder / "in", {**FILES, **{f"{name[0]}.txt": name.encode() for name in FILES}})
    ingest(folder / "in", out=folder / "shards", accept=("bmp", "gif", "avif", "tiff"), shard_size=3)
    return folder / "shards"


def by_name(out: Path) -> dict[str, dict[str, Any]]:
    """Rows by their text, which is the file's name."""
    return {row["text"]: row for row in rows_of(out)}


@pytest.mark.parametrize("format", FORMATS)
def test_they_are_refused_before_anything_is_written(crawl: Path, tmp_path: Path, format: str) -> None:
    with pytest.raises(BadInput) as refused:
        export(crawl, tmp_path / "out", format)
    text = f"{crawl}: shard 00000: has images that the readers of this export do not decode (bmp, gif)"
    assert str(refused.value) == f"{text}; --transcode jpeg encodes these anew"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"shard_size": 6}, {"image_extension": "keep"}])
@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_they_are_refused_while_writing_if_nothing_is_known_of_the_source(
    crawl: Path, tmp_path: Path, format: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_images, "may_have_further", lambda source: False)
    with pytest.raises(BadInput, match="images that the readers of this export do not decode"):
        export(
            crawl, tmp_path / "out", format, **(options if format == "webdataset" or "shard_size" in options else {})
        )
    assert not list((tmp_path / "out").glob("*.tar")) and not list((tmp_path / "out").glob("data/*"))


def test_sources_of_common_formats_are_not_read_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "in", {"a.jpg": photo(1), "b.png": photo(2, fmt="PNG"), "c.bmp": photo(3, fmt="BMP")})
    ingest(tmp_path / "in", out=tmp_path / "kept", accept=("bmp",))
    ingest(tmp_path / "in", out=tmp_path / "made", accept=("bmp",), transcode="png")
    ingest(tmp_path / "in", out=tmp_path / "plain", accept=("animated",))
    may = [export_images.may_have_further(Artifact.open(str(tmp_path / name))) for name in ("kept", "made", "plain")]
    assert may == [True, False, False]
    export(tmp_path / "made", tmp_path / "out")
    assert "never re-encoded, but for those whose JSON names an" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_they_are_encoded_anew(crawl: Path, tmp_path: Path, format: str, size: int | None) -> None:
    out = tmp_path / "out"
    notes = export(crawl, out, format, transcode="png", shard_size=size) or []
    assert [
        note for note in notes if "4 images in formats that not all readers decode are encoded anew, as png" in note
    ]
    before, after = by_name(crawl), by_name(out)
    assert [*before] == [*after]
    for name, row in after.items():
        source = before[name]
        assert row["source_uid"] == source["uid"] and row["key"] == source["key"]
        if name in ANEW:
            assert row["format"] == "png" and row["uid"] == row["sha256"][:32] != source["uid"]
            assert (row["original_sha256"], row["original_format"]) == (source["sha256"], source["format"])
        else:
            changed = {"source_uid", "original_sha256", "original_format"}
            assert {key: value for key, value in row.items() if key not in changed} == source
            assert row["original_sha256"] is None
    assert verify(str(out)).faults == []
    assert "never re-encoded, but for those" in (out / "README.md").read_text()


def test_tars_hold_what_was_shown_and_are_an_input(crawl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(crawl, out, transcode="jpeg", image_extension="keep", quality=97)
    seen = {}
    for path in sorted(out.glob("*.tar")):
        with path.open("rb") as stream:
            for sample in read_samples(stream):
                image, meta = sample.image(), json.loads(sample.members["json"].data or b"")
                assert image is not None and image.data is not None
                assert meta["uid"] == hashlib.sha256(image.data).hexdigest()[:32]
                seen[(sample.members["txt"].data or b"").decode()] = (image, meta)
    before = by_name(crawl)
    for name, (image, meta) in seen.items():
        assert image.name.endswith(".png" if name == "d.png" else ".jpg")
        if name not in ANEW:
            assert image.data == FILES[name] and "source_uid" not in meta
            continue
        assert meta["source_uid"] == before[name]["uid"] and meta["original_sha256"] == before[name]["sha256"]
        difference = np.abs(shown(image.data).astype(int) - shown(FILES[name])).mean()
        assert difference < 2
    rows = [row for shard in expand(str(out)) for row in RowReader(shard)]
    assert [row.uid for row in rows] == [row["uid"] for row in rows_of(out)]
    export(out, tmp_path / "again")  # an export of it needs nothing more
    assert verify(str(tmp_path / "again")).faults == []


def test_parquet_has_them_as_datasets_reads_them(crawl: Path, tmp_path: Path) -> None:
    export(crawl, tmp_path / "out", "parquet", transcode="webp")
    table = pq.read_table(tmp_path / "out/data")
    images = {row["text"]: row["image"] for row in table.to_pylist()}
    for name in ANEW:
        opened = Image.open(io.BytesIO(images[name]["bytes"]))
        assert opened.format == "WEBP" and images[name]["path"].endswith(".webp")
    assert images["a.jpg"]["bytes"] == FILES["a.jpg"]
    assert {"source_uid", "original_sha256"} <= {*table.column_names}


def test_a_format_of_ones_own_may_take_more(crawl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capipe.stages.export.formats.import_object", lambda name: Archive)
    assert export(crawl, tmp_path / "out", "mine:Archive") == []
    images = {row["text"]: row["image"]["bytes"] for row in pq.read_table(tmp_path / "out/data").to_pylist()}
    assert images == FILES
    assert apart(shown(images["f.tif"]), shown(FILES["f.tif"])) == 0


@pytest.mark.parametrize("format", ["webdataset", "parquet", "llava"])
def test_images_are_withdrawn_by_either_uid(crawl: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "out"
    export(crawl, out, format, transcode="png")
    rows = by_name(out)
    listed = [rows["b.bmp"]["source_uid"], rows["e.avif"]["uid"], rows["a.jpg"]["uid"]]
    assert len(prove_absent(str(out), UidSet.of(listed)).faults) >= 3
    export(crawl, out, format, transcode="png", drop=UidSet.of(listed))
    gone = {row["key"] for row in rows_of(out) if row["status"] == "withdrawn"}
    assert gone == {rows[name]["key"] for name in ("a.jpg", "b.bmp", "e.avif")}
    report = prove_absent(str(out), UidSet.of(listed))
    assert report.faults == [] and report.rows >= 3 and verify(str(out)).faults == []


def test_the_same_command_writes_the_same_bytes_and_another_is_refused(crawl: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 0), ("two", 2)):
        export(crawl, tmp_path / name, transcode="jpeg", workers=workers)
    for path in (tmp_path / "one").glob("0*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    export(crawl, tmp_path / "one", transcode="jpeg")  # nothing is left to do
    with pytest.raises(Exception, match="transcode"):
        export(crawl, tmp_path / "one", transcode="png")
    with pytest.raises(BadInput, match="--link: tars are written anew"):
        export(crawl, tmp_path / "linked", transcode="jpeg", image_extension="keep", link=True)
