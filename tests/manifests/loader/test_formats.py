"""Shards of mixed formats: as crawled, encoded anew by `ingest` or by `export`; captions of the originals join all."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

import capipe
from capipe.errors import ArtifactMismatch
from capipe.manifests.artifact import Artifact
from capipe.manifests.loader.dataset import ImageCaptions
from capipe.manifests.shards import uid_of
from capipe.stages.ingest.accept import ACCEPTED

from ...conftest import photo
from ...stages.exporting import export, rows_of
from ...stages.ingesting import fill, ingest, members
from ...stages.scored import write_scores
from .captioned import Captioned, joined, keys, loaded, write_captions

FIXTURES = Path(__file__).parents[2] / "models/images/formats"
#: Written by other programs (its make.sh), each with the PNG that ImageMagick makes of it beside it.
FURTHER = ("plain.avif", "turned-1.avif", "still.gif", "24bit.bmp", "mirrored.tiff", "from-turned.heic", "turned.jxl")
FILES = {"a.jpg": photo(1), "b.png": photo(2, fmt="PNG"), "c.webp": photo(3, fmt="WEBP")}
FILES |= {name: (FIXTURES / name).read_bytes() for name in FURTHER}


class Crawl(NamedTuple):
    """The same files as three kinds of shards; captions and scores are of the first."""

    kept: Captioned
    ingested: Path
    exported: Path


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Crawl:
    for module in ("pillow_heif", "pillow_jxl"):
        pytest.importorskip(module, reason="its extra is not installed")
    folder = tmp_path_factory.mktemp("formats")
    texts = {f"{Path(name).stem}.txt": name.encode() for name in FILES}
    fill(folder / "in", {**FILES, **texts, "z.jpg": b"\xff\xd8\xff broken"})
    ingest(folder / "in", out=folder / "kept", accept=ACCEPTED, shard_size=4)
    ingest(folder / "in", out=folder / "ingested", accept=ACCEPTED, transcode="png", shard_size=4)
    export(folder / "kept", folder / "exported", transcode="webp", image_extension="keep")
    return Crawl(joined(folder, folder / "kept"), folder / "ingested", folder / "exported")


def listed(shards: Path) -> dict[str, dict[str, Any]]:
    """Rows of images by their original caption, which is the file's name."""
    return {row["text"]: row for row in rows_of(shards) if row["status"] == "ok"}


def opened(shards: Path, data: Captioned, **options: Any) -> ImageCaptions:
    return capipe.open_dataset(shards, **{"captions": data.captions, "scores": data.scores, **options})


def checked(dataset: ImageCaptions, shards: Path, kept: Path, workers: int = 0) -> None:
    """Every image once, with the bytes in its tar, under the uid of these, and the caption of the original."""
    samples = {s["key"]: s for batch in loaded(dataset, workers) for s in batch}
    stored, originals = members(shards), listed(kept)
    assert len(samples) == len(dataset) == len(FILES)
    for name, row in listed(shards).items():
        sample = samples[row["key"]]
        assert sample["image"] == stored[f"{row['key']}.{row['format']}"]
        assert sample["uid"] == row["uid"] == hashlib.sha256(sample["image"]).hexdigest()[:32]
        assert sample["caption"] == f"dense caption by m of {originals[name]['uid']}"
        assert sample["scores"]["re_clip_score"] is not None and sample["json"]["uid"] == row["uid"]
        if row["uid"] == originals[name]["uid"]:
            assert sample["image"] == FILES[name]


@pytest.mark.parametrize("workers", [0, 2])
def test_as_crawled(crawl: Crawl, workers: int) -> None:
    kept = crawl.kept.shards
    checked(opened(kept, crawl.kept), kept, kept, workers)
    formats = {row["format"] for row in listed(kept).values()}
    assert formats == {"jpg", "png", "webp", "avif", "gif", "bmp", "tiff", "heic", "jxl"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["ingested", "exported"])
def test_encoded_anew(crawl: Crawl, kind: str, workers: int) -> None:
    shards, kept = getattr(crawl, kind), crawl.kept.shards
    checked(opened(shards, crawl.kept), shards, kept, workers)
    anew = [name for name, row in listed(shards).items() if row["uid"] != listed(kept)[name]["uid"]]
    assert sorted(anew) == sorted(FURTHER)
    checked(opened(shards, crawl.kept, where="clip_score >= 0 and width >= 1"), shards, kept)


def test_an_export_of_what_ingest_encoded_anew(crawl: Crawl, tmp_path: Path) -> None:
    """Captions may be of what came, of what `ingest` stored, or of what was exported."""
    export(crawl.ingested, tmp_path / "out", transcode="jpeg", image_extension="keep")
    checked(opened(tmp_path / "out", crawl.kept), tmp_path / "out", crawl.kept.shards)
    for shards in (crawl.ingested, tmp_path / "out"):
        write_captions(shards, tmp_path / f"of-{shards.name}", model="n")
        samples = list(capipe.open_dataset(tmp_path / "out", captions=tmp_path / f"of-{shards.name}"))
        assert {s["caption"] for s in samples} == {f"dense caption by n of {r['uid']}" for r in listed(shards).values()}


def test_captions_of_originals_and_of_exports_together(crawl: Crawl, tmp_path: Path) -> None:
    write_captions(crawl.exported, tmp_path / "captions", model="n")
    write_scores(crawl.exported, tmp_path / "scores", seed=1)
    captions = {"old": str(crawl.kept.captions), "new": str(tmp_path / "captions")}
    dataset = capipe.open_dataset(
        crawl.exported, captions=captions, scores=tmp_path / "scores", mix={"old": 0.5, "new": 0.5}
    )
    uids = {"old": listed(crawl.kept.shards), "new": listed(crawl.exported)}
    expected = {
        name: {row["key"]: f"dense caption by {model} of {row['uid']}" for row in uids[name].values()}
        for name, model in (("old", "m"), ("new", "n"))
    }
    names = set()
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for sample in dataset:
            names.add(sample["caption_name"])
            assert sample["caption"] == expected[sample["caption_name"]][sample["key"]]
    assert names == {"old", "new"}


def test_ranks_and_resuming(crawl: Crawl) -> None:
    parts = [opened(crawl.exported, crawl.kept, rank=rank, world=2) for rank in range(2)]
    seen = [key for part in parts for key in keys(loaded(part, 2, 2))]
    assert sorted(seen) == sorted(row["key"] for row in listed(crawl.exported).values())
    again = opened(crawl.exported, crawl.kept, rank=0, world=2)
    whole = keys(loaded(parts[0], 2, 2))
    again.load_state_dict(parts[0].state_dict(2, 2))
    assert keys(loaded(again, 2, 2)) == whole[2:]


@pytest.mark.parametrize("decode", ["pil", "array"])
def test_pixels(crawl: Crawl, decode: Any) -> None:
    """Upright, also of formats that Pillow alone does not open, as ImageMagick shows them."""
    pixels = {each["key"]: np.asarray(each["image"]) for each in opened(crawl.kept.shards, crawl.kept, decode=decode)}
    rows = listed(crawl.kept.shards)
    for name in FURTHER:
        expected = np.asarray(Image.open(FIXTURES / f"{name}.png").convert("RGB"))
        found = pixels[rows[name]["key"]]
        assert found.shape == expected.shape and found.dtype == np.uint8
        assert np.abs(found.astype(int) - expected).mean() < 3, name


def test_datasets_has_the_same_bytes(crawl: Crawl) -> None:
    import datasets

    for shards in (crawl.kept.shards, crawl.exported):
        read = opened(shards, crawl.kept).as_datasets(2)
        rows = list(read.cast_column("image", datasets.Image(decode=False)))
        assert len(rows) == len(FILES) and all(uid_of(row["image"]["bytes"]) == row["uid"] for row in rows)
    sizes = {each["key"]: each["image"].size for each in opened(crawl.exported, crawl.kept).as_datasets(2)}
    assert sizes == {row["key"]: (row["width"], row["height"]) for row in listed(crawl.exported).values()}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_captions_of_other_images_under_the_same_keys(crawl: Crawl, tmp_path: Path) -> None:
    """One other image among ten, encoded anew or not, in the first shard or a later one."""
    for name in ("a.jpg", "plain.avif", "mirrored.tiff"):
        folder = tmp_path / name
        other = photo(50, fmt="JPEG" if name == "a.jpg" else "AVIF" if "avif" in name else "TIFF")
        fill(folder / "in", {**FILES, "z.jpg": b"\xff\xd8\xff broken", name: other})
        ingest(folder / "in", out=folder / "shards", accept=ACCEPTED, shard_size=4)
        write_captions(folder / "shards", folder / "captions")
        for shards in (crawl.ingested, crawl.exported):
            with pytest.raises(ArtifactMismatch, match=r"is another image than .* it was not made of these shards"):
                list(capipe.open_dataset(shards, captions=folder / "captions"))


def test_originals_do_not_know_what_became_of_them(crawl: Crawl, tmp_path: Path) -> None:
    write_captions(crawl.exported, tmp_path / "captions")
    with pytest.raises(ArtifactMismatch, match="it was not made of these shards"):
        capipe.open_dataset(crawl.kept.shards, captions=tmp_path / "captions")
    assert "source_uid" not in Artifact.open(str(crawl.kept.shards)).table("00000", None).column_names
