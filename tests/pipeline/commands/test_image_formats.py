"""Images of further formats through the commands: what `ingest` took is seen by every stage, tars by others are not."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capipe.models.engines.base import ImageInput, Prompt
from capipe.models.engines.http.images import data_url, shown
from capipe.models.images.formats import sniff
from capipe.pipeline.inspect.images import small_jpeg

from ...conftest import photo, tar_bytes
from ...models.images.test_further_formats import SECOND, written
from ...models.images.test_icc import apart
from ...stages.ingesting import fill
from ..conftest import CaptionServer, capipe, one_line, table

PICTURE = Image.open(io.BytesIO(photo(7, (192, 128), "PNG")))


def encoded(fmt: str, **options: object) -> bytes:
    out = io.BytesIO()
    PICTURE.save(out, fmt, **options)
    return out.getvalue()


OTHERS = [image.resize(PICTURE.size) for image in SECOND]
FILES = {
    "a.png": encoded("PNG"),
    "b.bmp": encoded("BMP"),
    "c.gif": encoded("GIF", save_all=True, append_images=OTHERS),
    "d.tiff": encoded("TIFF"),
    "e.avif": encoded("AVIF", quality=95),
    "f.webp": encoded("WEBP", save_all=True, append_images=OTHERS, lossless=True),
}
FURTHER = ("b.bmp", "c.gif", "d.tiff", "e.avif")


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one picture in six formats; ``shards`` beside it, of all of them, and ``foreign``, another tool's."""
    folder = tmp_path_factory.mktemp("crawl")
    fill(folder / "in", FILES)
    fill(folder / "foreign", {"00000.tar": tar_bytes(FILES)})
    capipe("ingest", folder / "in", "--out", folder / "shards", "--accept", "bmp,gif,tif,avif,animated")
    return folder


def test_a_server_sees_the_first_frame_in_a_format_that_it_reads(
    crawl: Path, tmp_path: Path, server: CaptionServer
) -> None:
    sent: list[bytes] = []

    def fails(number: int, image: bytes) -> int:
        sent.append(image)
        return 200

    server.fails = fails
    capipe("annotate", "--shards", crawl / "shards", "--out", tmp_path / "out", "--engine", server.url, "--model", "m")
    assert [row["status"] for row in table(tmp_path / "out")] == ["ok"] * 6 and len(sent) == 6
    for image in sent:
        opened = Image.open(io.BytesIO(image))
        assert sniff(image) in ("jpg", "png") and getattr(opened, "n_frames", 1) == 1
        assert np.abs(np.asarray(opened.convert("RGB")).astype(int) - np.asarray(PICTURE)).mean() < 12


def test_in_tars_by_others_they_stay_unsupported(crawl: Path, tmp_path: Path, server: CaptionServer) -> None:
    foreign = f"{crawl / 'foreign'}/*.tar"
    capipe("annotate", "--shards", foreign, "--out", tmp_path / "out", "--engine", server.url, "--model", "m")
    rows = {row["key"]: row for row in table(tmp_path / "out")}
    assert {key for key, row in rows.items() if row["status"] == "ok"} == {"a"} and server.requests == 1
    assert rows["e"]["error"] == "not a JPEG, PNG or WebP image: an AVIF image"
    assert rows["f"]["error"] == "animated image (2 frames)"
    capipe("dedup", "--shards", foreign, "--out", tmp_path / "marks")
    assert [row["status"] for row in table(tmp_path / "marks/marked")].count("unsupported") == 5


def test_dedup_finds_one_picture_in_all_formats(crawl: Path, tmp_path: Path) -> None:
    capipe("dedup", "--shards", crawl / "shards", "--out", tmp_path / "out")
    rows = table(tmp_path / "out/marked")
    same = [row for name, row in zip(FILES, rows, strict=True) if name != "c.gif"]  # 256 colors are another picture
    assert sorted(row["status"] for row in same) == ["duplicate"] * 4 + ["ok"]
    assert len({row["group"] for row in same}) == 1 and {row["status"] for row in rows} == {"ok", "duplicate"}
    benchmark = fill(tmp_path / "benchmark", {"x.avif": FILES["e.avif"]})
    fill(tmp_path / "plain", {"y.jpg": encoded("JPEG", quality=95)})
    capipe("ingest", tmp_path / "plain", "--out", tmp_path / "shards")
    capipe("dedup", "--shards", tmp_path / "shards", "--out", tmp_path / "leaks", "--against", benchmark)
    assert [row["status"] for row in table(tmp_path / "leaks/marked")] == ["contaminated"]


def test_embeddings_are_of_the_picture_whatever_its_format(crawl: Path, tmp_path: Path) -> None:
    capipe("embed", "--shards", crawl / "shards", "--out", tmp_path / "out", "--clip", "tiny/clip")
    vectors = [np.array(row["image_embedding"], np.float32) for row in table(tmp_path / "out")]
    exact = [index for index, name in enumerate(FILES) if name not in ("c.gif", "e.avif")]
    for index in exact:
        assert np.allclose(vectors[index], vectors[0], atol=2e-3)
    assert min(float(vectors[0] @ vector) for vector in vectors) > 0.9


@pytest.mark.parametrize("kind", ["bmp", "gif", "tiff", "avif", "heic", "jxl", "jp2", "ico"])
def test_reports_and_the_viewer_show_them(kind: str) -> None:
    small = small_jpeg(written(kind), 64)
    assert small is not None and Image.open(io.BytesIO(small)).size == (64, 43)


def test_exports_refuse_or_encode_them(crawl: Path, tmp_path: Path) -> None:
    refused = capipe("export", crawl / "shards", "--out", tmp_path / "out", code=2)
    assert "do not decode (avif, bmp, gif, tiff); --transcode jpeg encodes these anew" in one_line(refused)
    assert not (tmp_path / "out").exists()
    wrong = capipe("export", crawl / "shards", "--out", tmp_path / "out", "--transcode", "gif", code=2)
    assert "--transcode gif: use one of jpeg, webp, png" in one_line(wrong)
    wrong = capipe("export", crawl / "shards", "--out", tmp_path / "out", "--quality", "80", code=2)
    assert "--quality: of --transcode jpeg or webp" in one_line(wrong)
    options = ("--transcode", "png", "--image-extension", "keep")
    capipe("export", crawl / "shards", "--out", tmp_path / "out", *options)
    assert "clean" in capipe("verify", tmp_path / "out").stdout
    assert [row["source_uid"] for row in table(tmp_path / "out")] == [row["uid"] for row in table(crawl / "shards")]


async def test_servers_of_a_trainer_get_copies_too() -> None:
    for name in FURTHER:
        prompt = await shown(Prompt("what?", ImageInput("u", encoded=FILES[name])))
        assert prompt.image is not None
        head, _, data = data_url(prompt.image).partition(";base64,")
        assert head == "data:image/png"
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert name not in ("b.bmp", "d.tiff") or apart(seen, np.asarray(PICTURE)) == 0
