"""Further formats: taken where they are asked for, with their bytes or encoded anew once."""

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

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.files.image_types import FURTHER, IMAGE_TYPES
from capipe.manifests.schema import INGEST, TRANSCODED
from capipe.manifests.verify import verify
from capipe.stages.ingest.accept import ACCEPTED, accepted
from capipe.stages.ingest.shard import IngestConfig

from ...conftest import photo
from ...models.images.test_further_formats import SECOND, written
from ...models.images.test_icc import apart, seen
from ..ingesting import fill, ingest, members, rows
from .test_shard import encode

IMAGE = Image.open(io.BytesIO(photo(4))).convert("RGB")


@pytest.fixture
def crawl(tmp_path: Path) -> Path:
    """One image in each of Pillow's formats, an animation in each, and what is no image."""
    files = {
        "a.jpg": photo(4),
        "b.bmp": encode(IMAGE, "BMP"),
        "c.tif": encode(IMAGE, "TIFF"),
        "d.gif": encode(IMAGE, "GIF", save_all=True, append_images=SECOND),
        "e.avif": encode(IMAGE, "AVIF", quality=90),
        "f.webp": encode(IMAGE, "WEBP", save_all=True, append_images=SECOND, lossless=True),
        "g.gif": photo(5),  # a JPEG by content
        "h.jpg": encode(IMAGE, "BMP"),  # a BMP
        "i.avif": encode(IMAGE, "AVIF")[:-40],
        "j.pdf": b"%PDF-1.7",
    }
    return fill(tmp_path / "crawl", {**files, "b.json": json.dumps({"original_format": "painted"}).encode()})


def statuses(out: Path) -> dict[str, tuple[str, str | None]]:
    return {Path(row["source"]).name: (row["status"], row["format"]) for row in rows(out)}


def test_by_default_they_are_rows_that_say_what_takes_them(crawl: Path, tmp_path: Path) -> None:
    ingest(crawl, out=tmp_path / "out")
    errors = {Path(row["source"]).name: row["error"] for row in rows(tmp_path / "out")}
    plain = "not a JPEG, PNG or WebP image"
    assert errors["b.bmp"] == f"{plain}: a BMP image; --accept bmp takes it" == errors["h.jpg"]
    assert errors["c.tif"] == f"{plain}: a TIFF image; --accept tiff takes it"
    assert errors["e.avif"] == f"{plain}: an AVIF image; --accept avif takes it"
    assert errors["f.webp"] == "animated image (2 frames); --accept animated takes the first"
    assert errors["j.pdf"] == f"{plain}: a PDF document"
    assert {name for name, (status, _) in statuses(tmp_path / "out").items() if status == "ok"} == {"a.jpg", "g.gif"}
    schema = pq.read_schema(tmp_path / "out/00000.parquet")
    assert schema.names == INGEST.names


def test_their_bytes_are_kept_under_the_extension_of_their_content(crawl: Path, tmp_path: Path) -> None:
    ingest(crawl, out=tmp_path / "out", accept=ACCEPTED)
    found, data = {Path(row["source"]).name: row for row in rows(tmp_path / "out")}, members(tmp_path / "out")
    expected = {"a.jpg": "jpg", "b.bmp": "bmp", "c.tif": "tiff", "d.gif": "gif", "e.avif": "avif"}
    expected |= {"f.webp": "webp", "g.gif": "jpg", "h.jpg": "bmp"}
    for name, kind in expected.items():
        row, original = found[name], (crawl / name).read_bytes()
        assert (row["status"], row["format"], row["width"], row["height"]) == ("ok", kind, 96, 64)
        assert data[f"{row['key']}.{kind}"] == original
        assert row["uid"] == hashlib.sha256(original).hexdigest()[:32]
        assert row["error"] == ("the first of 2 frames" if name in ("d.gif", "f.webp") else None)
    assert (found["i.avif"]["status"], found["j.pdf"]["status"]) == ("corrupt", "unsupported")
    assert found["b.bmp"]["phash"] == found["c.tif"]["phash"] == found["f.webp"]["phash"]
    assert pq.read_schema(tmp_path / "out/00000.parquet").names == INGEST.names
    assert verify(str(tmp_path / "out")).faults == []


@pytest.mark.parametrize(("transcode", "kind"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_they_are_encoded_anew_once(crawl: Path, tmp_path: Path, transcode: str, kind: str) -> None:
    ingest(crawl, out=tmp_path / "out", accept=ACCEPTED, transcode=transcode)
    found, data = {Path(row["source"]).name: row for row in rows(tmp_path / "out")}, members(tmp_path / "out")
    was = {"b.bmp": "bmp", "c.tif": "tiff", "d.gif": "gif", "e.avif": "avif", "f.webp": "webp", "h.jpg": "bmp"}
    for name, original in was.items():
        row = found[name]
        stored = data[f"{row['key']}.{kind}"]
        sha256 = hashlib.sha256(stored).hexdigest()
        assert (row["status"], row["format"], row["sha256"], row["uid"]) == ("ok", kind, sha256, sha256[:32])
        bytes_before = (crawl / name).read_bytes()
        assert row["original_sha256"] == hashlib.sha256(bytes_before).hexdigest()
        assert row["original_format"] == original
        meta = json.loads(data[f"{row['key']}.json"])
        assert (meta["original_sha256"], meta["uid"]) == (row["original_sha256"], row["uid"])
        assert meta["original_format"] == original
        if transcode == "png" and original in ("bmp", "tiff"):
            assert apart(seen(stored), np.asarray(IMAGE)) == 0
    for name in ("a.jpg", "g.gif"):
        row = found[name]
        assert data[f"{row['key']}.jpg"] == (crawl / name).read_bytes()
        assert (row["original_sha256"], row["original_format"]) == (None, None)
        assert "original_sha256" not in json.loads(data[f"{row['key']}.json"])
    assert json.loads(data[f"{found['b.bmp']['key']}.json"])["original_original_format"] == "painted"
    assert found["i.avif"]["original_sha256"] is None and found["i.avif"]["sha256"] is not None
    assert pq.read_schema(tmp_path / "out/00000.parquet").names == TRANSCODED.names
    assert verify(str(tmp_path / "out")).faults == []


def test_the_same_command_writes_the_same_bytes(crawl: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 0), ("two", 2)):
        ingest(crawl, out=tmp_path / name, accept=("gif", "avif"), transcode="jpeg", quality=70, workers=workers)
    for path in (tmp_path / "one").glob("0*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    with pytest.raises(ArtifactMismatch, match="quality"):
        ingest(crawl, out=tmp_path / "one", accept=("gif", "avif"), transcode="jpeg", quality=71)


def test_quality_of_what_is_encoded(crawl: Path, tmp_path: Path) -> None:
    sizes = []
    for quality in (30, None):
        out = tmp_path / f"{quality}"
        ingest(crawl, out=out, accept=("bmp",), transcode="jpeg", quality=quality)
        sizes.append(max(len(data) for name, data in members(out).items() if name.endswith("00000001.jpg")))
    assert sizes[0] < sizes[1] * 0.7


@pytest.mark.parametrize("kind", ["heic", "jxl"])
def test_formats_of_extras(kind: Any, tmp_path: Path) -> None:
    data = written(kind)
    source = fill(tmp_path / "in", {f"a.{kind}": data})
    ingest(source, out=tmp_path / "out", accept=(kind,))
    (row,) = rows(tmp_path / "out")
    assert (row["status"], row["format"], row["width"]) == ("ok", kind, 96)
    assert members(tmp_path / "out")[f"{row['key']}.{kind}"] == data
    ingest(source, out=tmp_path / "png", accept=(kind,), transcode="png")
    (row,) = rows(tmp_path / "png")
    assert (row["status"], row["format"], row["original_format"]) == ("ok", "png", kind)


def test_names_of_formats() -> None:
    assert accepted(None) == () and accepted("gif, TIF,avif") == ("avif", "gif", "tiff")
    assert accepted("jpg,jpeg,png,webp,bmp") == ("bmp",)
    everything = set(accepted("all"))
    assert {"animated", *FURTHER} - everything <= {name for name in FURTHER if IMAGE_TYPES[name].extra}
    with pytest.raises(BadInput, match="--accept tga: unknown; one of avif, gif, bmp, tiff, "):
        accepted("gif,tga")
    with pytest.raises(BadInput, match="--accept tga: unknown"):
        IngestConfig(accept=("tga",))
    with pytest.raises(BadInput, match="it names none"):
        IngestConfig(transcode="png")
    with pytest.raises(BadInput, match="--quality: of --transcode jpeg or webp"):
        IngestConfig(accept=("gif",), transcode="png", quality=90)
    assert IngestConfig(accept=("tiff", "avif")).accept == ("avif", "tiff")
    assert not {"accept", "transcode", "quality"} & set(IngestConfig().model_dump(mode="json"))
