"""Folders of rendered images in the layout of a crawl: image, alt text, and the scene graph as metadata.

``python -m capipe.models.tiny.world.corpus FOLDER --images 400 --split train --seed 31 --crowded 0.3``
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, get_args

from PIL import Image

from .captions import short_caption
from .render import render
from .scenes import Scene, Split, scenes

Format = Literal["jpg", "png", "webp"]

QUALITY = 92


@dataclass(frozen=True)
class CorpusSample:
    """One image: its ``key`` in the corpus, the encoded ``image``, a short ``caption`` and the ``scene`` it shows."""

    key: str
    image: bytes
    caption: str
    scene: Scene


def samples(
    count: int, split: Split, seed: int, fmt: Format = "jpg", size: int = 112, crowded: float = 0.0
) -> Iterator[CorpusSample]:
    """``count`` samples, the same ones for the same arguments; sample ``i`` does not depend on ``count``.

    ``crowded``: the probability of a scene with six to nine things.
    """
    for index, scene in enumerate(scenes(split, count, seed, crowded)):
        rng = Random(f"corpus:{split}:{seed}:{index}")
        image = encode(render(scene, rng, size), fmt)
        yield CorpusSample(f"{index:06d}", image, short_caption(scene, rng), scene)


def encode(image: Image.Image, fmt: Format) -> bytes:
    """The encoded file, without timestamps. Raises ValueError for an unknown format."""
    buffer = io.BytesIO()
    match fmt:
        case "jpg":
            image.save(buffer, "JPEG", quality=QUALITY)
        case "png":
            image.save(buffer, "PNG")
        case "webp":
            image.save(buffer, "WEBP", quality=QUALITY)
        case _:
            raise ValueError(f"a corpus is of jpg, png or webp files, not {fmt!r}")
    return buffer.getvalue()


def write_corpus(
    folder: Path,
    count: int,
    split: Split,
    seed: int,
    fmt: Format = "jpg",
    size: int = 112,
    crowded: float = 0.0,
) -> list[CorpusSample]:
    """Write ``<key>.<fmt>``, ``<key>.txt`` and ``<key>.json`` ({"scene": ...}) for each sample; returns the samples."""
    folder.mkdir(parents=True, exist_ok=True)
    written = list(samples(count, split, seed, fmt, size, crowded))
    for sample in written:
        (folder / f"{sample.key}.{fmt}").write_bytes(sample.image)
        (folder / f"{sample.key}.txt").write_text(sample.caption, encoding="utf-8")
        truth = json.dumps({"scene": sample.scene.to_dict()}, sort_keys=True)
        (folder / f"{sample.key}.json").write_text(truth, encoding="utf-8")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Render pictures with alt texts and their truth into a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--split", choices=get_args(Split), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crowded", type=float, default=0.0, help="share of scenes with six to nine things")
    options = parser.parse_args()
    if not 0 <= options.crowded <= 1:
        parser.error(f"--crowded {options.crowded}: a share is between 0 and 1")
    write_corpus(options.folder, options.images, options.split, options.seed, crowded=options.crowded)
    print(f"{options.images} pictures in {options.folder}")


if __name__ == "__main__":
    main()
