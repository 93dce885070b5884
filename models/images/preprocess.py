"""One decode, several views: an image's pixels as each scoring model wants them, in bytes, not yet normalised.

Imported by decoding processes, so it must stay light: numpy and Pillow; torch only where a view asks for it. JPEGs are
decoded at full size: a score is to be the library's own, and scaling within the DCT would shift it.
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
class View:
    """How a model's pictures are made, in open_clip's terms (``preprocess_cfg``): target size in pixels.

    ``shortest``: the shorter side to the target's, then the middle; ``longest``: all of the picture, ``fill`` (a gray
    level) around it; ``squash``: to the target's very size. ``by``: who resizes; transformers has torchvision do it,
    whose pixels are another level than Pillow's in two of a thousand places, which moved ITM scores by up to 1e-3.
    """

    height: int
    width: int
    resize: Resize = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fill: int = 0
    by: Literal["pillow", "torchvision"] = "pillow"


def decode_views(data: bytes, *, views: tuple[View, ...], limits: ImageLimits) -> tuple[Pixels, ...] | ImageProblem:
    """The image in every view, each ``(height, width, 3)`` uint8, or what is wrong with it."""
    image = decode_upright(data, limits)
    if isinstance(image, ImageProblem):
        return image
    return tuple(np.asarray(view_of(image, view)) for view in views)


def view_of(image: Image.Image, view: View) -> Image.Image:
    """``image`` (RGB) resized and cropped; equal to open_clip's own transforms, to the bit."""
    how = Image.Resampling.BICUBIC if view.interpolation == "bicubic" else Image.Resampling.BILINEAR
    width, height = image.size
    match view.resize:
        case "squash":
            if image.size == (view.width, view.height):
                return image
            if view.by == "torchvision":
                return _squashed_by_torchvision(image, view)
            return image.resize((view.width, view.height), how)
        case "shortest":
            if view.height == view.width:
                short = view.height
                size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
            else:  # open_clip takes bicubic here, whatever was asked for
                how = Image.Resampling.BICUBIC
                ratio = min(width / view.width, height / view.height)
                size = (round(width / ratio), round(height / ratio))
        case "longest":
            ratio = max(width / view.width, height / view.height)
            size = (round(width / ratio), round(height / ratio))
    return _centered(image if size == image.size else image.resize(size, how), view)


def _centered(image: Image.Image, view: View) -> Image.Image:
    """The middle of ``image``, with ``fill`` where it does not reach."""
    width, height = image.size
    if width < view.width or height < view.height:
        left, top = max(0, (view.width - width) // 2), max(0, (view.height - height) // 2)
        paper = Image.new("RGB", (max(width, view.width), max(height, view.height)), (view.fill,) * 3)
        paper.paste(image, (left, top))
        image = paper
        width, height = image.size
    left, top = round((width - view.width) / 2.0), round((height - view.height) / 2.0)
    return image.crop((left, top, left + view.width, top + view.height))


def _squashed_by_torchvision(image: Image.Image, view: View) -> Image.Image:
    import torch  # this process has it only for such a view
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    torch.set_num_threads(1)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    size = [view.height, view.width]
    resized = resize(levels, size, interpolation=InterpolationMode(view.interpolation), antialias=True)
    return Image.fromarray(resized.permute(1, 2, 0).numpy())
