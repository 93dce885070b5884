"""Crawls of all image formats as others read them: exports by their own readers, and the loader, byte by byte."""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import capipe
from capipe.errors import BadInput
from capipe.models.images.decode import EVERYTHING, ImageLimits, decode_upright
from capipe.pipeline.inspect.verify import verify
from capipe.stages.ingest.accept import accepted

from ...conftest import photo
from ...manifests.loader.captioned import write_captions
from ..exporting import croissant_of, export, rows_of
from ..ingesting import fill, ingest, members

FIXTURES = Path(__file__).parents[2] / "models/images/formats"  # by ImageMagick, ffmpeg, libavif, libheif and libjxl
COMMON = {"a.jpg": photo(1), "b.png": photo(2, fmt="PNG"), "c.webp": photo(3, fmt="WEBP")}
FURTHER = ("p3-icc.avif", "turned-1.avif", "animated.gif", "24bit.bmp", "mirrored.tiff", "420.heic", "turned.jxl")
FILES = {**COMMON, **{name: (FIXTURES / name).read_bytes() for name in FURTHER}}
EXPORTS = ("webdataset", "lance", "parquet")

Images = dict[str, bytes]  # by caption, which is the file's name


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``shards``: the files as crawled; an export in each of the :data:`EXPORTS`, what not all decode encoded anew."""
    for module in ("pillow_heif", "pillow_jxl"):
        pytest.importorskip(module, reason="its extra is not installed")
    folder = tmp_path_factory.mktemp("crawl")
    fill(folder / "in", {**FILES, **{f"{Path(name).stem}.txt": name.encode() for name in FILES}, "z.jpg": b"\xff\xd8"})
    ingest(folder / "in", out=folder / "shards", accept=accepted("all"), shard_size=4)
    for format in EXPORTS:
        export(folder / "shards", folder / format, format, transcode="png", image_extension="auto")
    return folder


@functools.cache
def stored(crawl: Path) -> Images:
    """What is to be exported: common formats as they came, of the others the PNGs that the listings name."""
    found, tars = {}, members(crawl / "webdataset")
    for row in rows_of(crawl / "webdataset"):
        if row["status"] == "ok":
            data = found[row["text"]] = tars[f"{row['key']}.jpg"]  # all have one extension; readers go by content
            assert hashlib.sha256(data).hexdigest() == row["sha256"]
    return found


def same(found: Iterable[tuple[str, bytes]], images: Images) -> None:
    """Every image once, with these bytes."""
    listed = list(found)
    assert len(listed) == len(images) == len(FILES) and dict(listed) == images


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`datasets` on a folder, images undecoded, with a cache of its own and no network."""
    datasets = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()

    def load(folder: Path, image: str, streaming: bool) -> Any:
        cache = {} if streaming else {"cache_dir": str(tmp_path / "hf")}
        rows = datasets.load_dataset(str(folder), split="train", streaming=streaming, **cache)
        return rows.cast_column(image, datasets.Image(decode=False))

    return load


def test_what_is_stored_is_what_was_seen(crawl: Path) -> None:
    images = stored(crawl)
    assert {name: images[name] for name in COMMON} == COMMON and images.keys() == FILES.keys()
    for name in FURTHER:
        seen = decode_upright(FILES[name], ImageLimits(accept=EVERYTHING))
        assert isinstance(seen, Image.Image) and images[name].startswith(b"\x89PNG")
        assert np.array_equal(pixels(images[name]), np.asarray(seen))
    formats = {row["format"] for row in rows_of(crawl / "shards") if row["status"] == "ok"}
    assert formats == {"jpg", "png", "webp", "avif", "gif", "bmp", "tiff", "heic", "jxl"}


@pytest.mark.parametrize("format", EXPORTS)
def test_kept_bytes_are_refused_by_name(crawl: Path, tmp_path: Path, format: str) -> None:
    """Of a table, too: its readers decode by Pillow, or by whatever the training code has."""
    text = r"shard 00000: has images that the readers of this export do not decode \(bmp, gif, heic\); --transcode jpeg"
    with pytest.raises(BadInput, match=text):
        export(crawl / "shards", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_verify(crawl: Path) -> None:
    for name in ("shards", *EXPORTS):
        assert verify(str(crawl / name)).faults == []


def only_image(sample: dict[str, Any]) -> bytes:
    """The member that is neither text nor JSON, under the name of its own format."""
    (data,) = [member for name, member in sample.items() if not name.startswith("__") and name not in ("txt", "json")]
    return bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset(crawl: Path, workers: int) -> None:
    """Its own pipeline reads the tars of an export, and as bytes those as crawled."""
    import webdataset
    from torch.utils.data import DataLoader

    def read(folder: Path) -> list[dict[str, Any]]:
        tars = sorted(str(path) for path in folder.glob("*.tar"))
        samples = webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=None)
        return list(DataLoader(samples, batch_size=None, num_workers=workers))

    same([(sample["txt"].decode(), sample["jpg"]) for sample in read(crawl / "webdataset")], stored(crawl))
    crawled = read(crawl / "shards")
    same([(sample["txt"].decode(), only_image(sample)) for sample in crawled], FILES)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("format", "columns"), [("webdataset", ("txt", "jpg")), ("lance", ("caption", "image"))])
def test_datasets(crawl: Path, hub: Callable[..., Any], format: str, columns: tuple[str, str], streaming: bool) -> None:
    rows = list(hub(crawl / format, columns[1], streaming))
    same([(row[columns[0]], row[columns[1]]["bytes"]) for row in rows], stored(crawl))


def test_pylance(crawl: Path) -> None:
    import lance

    read = lance.dataset(str(crawl / "lance/train.lance"))
    rows = read.to_table().to_pylist()
    same([(row["caption"], row["image"]) for row in rows], stored(crawl))
    for row in rows:
        source = FILES[row["caption"]]
        assert row["source_uid"] == hashlib.sha256(source).hexdigest()[:32]
        assert row["original_sha256"] in (None, hashlib.sha256(source).hexdigest())
        assert (row["height"], row["width"]) == pixels(row["image"]).shape[:2]
    anew = read.to_table(columns=["caption"], filter="original_format IS NOT NULL")["caption"].to_pylist()
    assert sorted(anew) == sorted(FURTHER)
    last = read.take([len(rows) - 1], columns=["image"])["image"][0].as_py()
    assert last == rows[-1]["image"]


def pairs(batch: Any, **options: Any) -> list[tuple[str, bytes]]:
    return [(row["caption"], row["image"]) for row in batch.to_pylist()]


def test_torch_reads_lance(crawl: Path) -> None:
    from lance.torch.data import LanceDataset
    from torch.utils.data import DataLoader

    given = {"batch_size": 3, "columns": ["caption", "image"], "to_tensor_fn": pairs}
    loader = DataLoader(LanceDataset(str(crawl / "lance/train.lance"), **given), batch_size=None)
    same([pair for batch in loader for pair in batch], stored(crawl))


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_mlcroissant(crawl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """It gives decoded images."""
    opened = croissant_of(tmp_path, monkeypatch)
    assert not opened(crawl / "lance").metadata.ctx.issues.errors
    read = opened(crawl / format)
    rows = {row["rows/key"]: row for row in read.records("rows")}
    records = list(read.records("pairs"))
    assert len(rows) == len(FILES) + 1 and len(records) == len(FILES)
    shown = {rows[record["pairs/key"]]["rows/text"].decode(): record["pairs/image"].tobytes() for record in records}
    assert shown == {name: Image.open(io.BytesIO(data)).tobytes() for name, data in stored(crawl).items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader(crawl: Path, tmp_path: Path, workers: int) -> None:
    """Captions of the images as crawled; images as crawled, or as exported."""
    import datasets
    from torch.utils.data import DataLoader

    write_captions(crawl / "shards", tmp_path / "captions")
    names = {row["uid"]: row["text"] for row in rows_of(crawl / "shards")}
    for folder, images in ((crawl / "shards", FILES), (crawl / "webdataset", stored(crawl))):
        dataset = capipe.open_dataset(folder, captions=tmp_path / "captions")
        loader = DataLoader(dataset, 3, num_workers=workers, collate_fn=list)
        samples = [sample for batch in loader for sample in batch]
        same([(names[sample["caption"].rpartition(" ")[2]], sample["image"]) for sample in samples], images)
        rows = dataset.as_datasets(2).cast_column("image", datasets.Image(decode=False))
        same([(names[row["caption"].rpartition(" ")[2]], row["image"]["bytes"]) for row in rows], images)
