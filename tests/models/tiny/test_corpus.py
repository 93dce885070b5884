from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from capipe.models.tiny.world.corpus import encode, write_corpus
from capipe.models.tiny.world.grade import grade
from capipe.models.tiny.world.scenes import Scene, split_of


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_corpus(tmp_path / name, 5, "heldout", seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_a_longer_corpus_begins_with_the_shorter_one(tmp_path: Path) -> None:
    write_corpus(tmp_path / "short", 3, "train", 0)
    write_corpus(tmp_path / "long", 6, "train", 0)
    assert contents(tmp_path / "short").items() <= contents(tmp_path / "long").items()


@pytest.mark.parametrize(("fmt", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_each_sample_is_image_alt_text_and_truth(tmp_path: Path, fmt: str, kind: str) -> None:
    written = write_corpus(tmp_path, 4, "heldout", 0, fmt=fmt, size=140)  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 12
    for sample in written:
        assert "." not in sample.key
        with Image.open(tmp_path / f"{sample.key}.{fmt}") as image:
            assert (image.format, image.size) == (kind, (140, 140))
        scene = Scene.from_dict(json.loads((tmp_path / f"{sample.key}.json").read_text())["scene"])
        assert scene == sample.scene and split_of(scene) == "heldout"
        assert grade(scene, (tmp_path / f"{sample.key}.txt").read_text()).precision() == 1.0


def test_a_share_of_crowded_scenes(tmp_path: Path) -> None:
    written = write_corpus(tmp_path / "mixed", 20, "train", 0, crowded=0.5)
    counts = [len(sample.scene.things) for sample in written]
    assert min(counts) <= 5 < max(counts)
    for sample in written:
        assert grade(sample.scene, sample.caption).precision() == 1.0


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="jpg, png or webp"):
        encode(Image.new("RGB", (8, 8)), "gif")  # type: ignore[arg-type]
