"""Pixels for scoring models are those of the libraries' own transforms."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from capipe.manifests.status import Status
from capipe.models.images.decode import ImageLimits
from capipe.models.images.formats import ImageProblem
from capipe.models.images.preprocess import Preprocess, decode_preprocessed, preprocessed

LIMITS = ImageLimits(min_side=1)
SIZES = [(640, 480), (333, 517), (112, 112), (90, 300), (50, 40), (113, 112), (1000, 61)]


def noise(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(sum(size))
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("target", [112, (112, 96)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_view_is_what_open_clip_makes(
    size: tuple[int, int], resize: str, target: int | tuple[int, int], interpolation: str
) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    height, width = (target, target) if isinstance(target, int) else target
    config = PreprocessCfg(
        size=target, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize, interpolation=interpolation, fill_color=7
    )
    image = noise(size)
    theirs = (image_transform_v2(config, is_train=False)(image) * 255).round().to(torch.uint8).permute(1, 2, 0)
    ours = preprocessed(image, Preprocess(height, width, resize, interpolation, 7))  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(ours), theirs.numpy())


def test_one_decode_gives_all_views_upright_and_without_dct_scaling() -> None:
    image = noise((640, 480))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    preprocesses = (Preprocess(112, 112), Preprocess(64, 64, "squash"))
    got = decode_preprocessed(buffer.getvalue(), preprocesses=preprocesses, limits=LIMITS)
    assert not isinstance(got, ImageProblem)
    upright = Image.open(buffer).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    for pixels, preprocess in zip(got, preprocesses, strict=True):
        assert np.array_equal(pixels, np.asarray(preprocessed(upright, preprocess)))


def test_what_is_no_image_is_a_problem() -> None:
    got = decode_preprocessed(b"<html>", preprocesses=(Preprocess(8, 8),), limits=LIMITS)
    assert isinstance(got, ImageProblem)
    assert got.status is Status.UNSUPPORTED
