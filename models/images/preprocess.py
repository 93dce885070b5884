"""Preprocessing for scoring models: one decode, an image's pixels for each model, as bytes, not yet normalised.

Imported by decoding processes, so it must stay light: numpy and Pillow; torch only where a model needs it. JPEGs are
decoded at full size: scores must be the library's own, and scaling within the DCT would shift them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from .decode import ImageLimits, Pixels, decode_upright
from .formats import ImageProblem

Resize = Literal["shortest", "longest", "squash"]


@dataclass(frozen=True)
class Preprocess:
    """A model's image preprocessing, in open_clip's terms (``preprocess_cfg``): target size in pixels.

    ``shortest``: resize the shorter side to the target's, then centre-crop; ``longest``: fit the whole image, padded
    with ``fill`` (a gray level); ``squash``: resize to exactly the target's size. ``by``: the resizing library;
    transformers uses torchvision, whose pixels are another level than Pillow's in two of a thousand positions, which
    moved ITM scores by up to 1e-3.
    """

    height: int
    width: int
    resize: Resize = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fill: int = 0
    by: Literal["pillow", "torchvision"] = "pillow"


def decode_preprocessed(
    data: bytes, *, preprocesses: tuple[Preprocess, ...], limits: ImageLimits
) -> tuple[Pixels, ...] | ImageProblem:
    """The image by each preprocessing, each ``(height, width, 3)`` uint8, or its problem."""
    image = decode_upright(data, limits)
    if isinstance(image, ImageProblem):
        return image
    return tuple(np.asarray(preprocessed(image, preprocess)) for preprocess in preprocesses)


def preprocessed(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """``image`` (RGB) resized and cropped; bit-identical to open_clip's own transforms."""
    how = Image.Resampling.BICUBIC if preprocess.interpolation == "bicubic" else Image.Resampling.BILINEAR
    width, height = image.size
    match preprocess.resize:
        case "squash":
            if image.size == (preprocess.width, preprocess.height):
                return image
            if preprocess.by == "torchvision":
                return _squashed_by_torchvision(image, preprocess)
            return image.resize((preprocess.width, preprocess.height), how)
        case "shortest":
            if preprocess.height == preprocess.width:
                short = preprocess.height
                size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
            else:  # open_clip always uses bicubic here
                how = Image.Resampling.BICUBIC
                ratio = min(width / preprocess.width, height / preprocess.height)
                size = (round(width / ratio), round(height / ratio))
        case "longest":
            ratio = max(width / preprocess.width, height / preprocess.height)
            size = (round(width / ratio), round(height / ratio))
    return _centered(image if size == image.size else image.resize(size, how), preprocess)


def _centered(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Centre crop of ``image``, padded with ``fill`` where it does not reach."""
    width, height = image.size
    if width < preprocess.width or height < preprocess.height:
        left, top = max(0, (preprocess.width - width) // 2), max(0, (preprocess.height - height) // 2)
        paper = Image.new("RGB", (max(width, preprocess.width), max(height, preprocess.height)), (preprocess.fill,) * 3)
        paper.paste(image, (left, top))
        image = paper
        width, height = image.size
    left, top = round((width - preprocess.width) / 2.0), round((height - preprocess.height) / 2.0)
    return image.crop((left, top, left + preprocess.width, top + preprocess.height))


def _squashed_by_torchvision(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    import torch  # imported only for this resizing
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    torch.set_num_threads(1)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    size = [preprocess.height, preprocess.width]
    resized = resize(levels, size, interpolation=InterpolationMode(preprocess.interpolation), antialias=True)
    return Image.fromarray(resized.permute(1, 2, 0).numpy())
