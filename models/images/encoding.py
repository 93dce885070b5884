"""Encoding images anew, for `capipe ingest --transcode`."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from .headers.structure import unsupported

Codec = Literal["jpeg", "webp", "png"]

DEFAULT_QUALITY = 95
_LONGEST_SIDE = {"jpeg": 65_500, "webp": 16_383}  # pixels, of libjpeg and of the format


@dataclass(frozen=True, slots=True)
class Encoding:
    """``quality``: 1 to 100, of the lossy two. Chroma of JPEGs is kept at full resolution."""

    codec: Codec
    quality: int = DEFAULT_QUALITY


def encoded(image: Image.Image, encoding: Encoding) -> bytes:
    """An RGB image without any metadata, the same bytes each time. Raises UnusableImage for one that is too long."""
    longest = _LONGEST_SIDE.get(encoding.codec)
    if longest is not None and max(image.size) > longest:
        size = f"{image.width}x{image.height}"
        raise unsupported(f"{size} cannot be written as {encoding.codec}, whose sides have at most {longest} pixels")
    image.info = {}  # or Pillow would write the profile again
    out = io.BytesIO()
    match encoding.codec:
        case "jpeg":
            image.save(out, "JPEG", quality=encoding.quality, subsampling=0)
        case "webp":
            image.save(out, "WEBP", quality=encoding.quality, method=4)
        case "png":
            image.save(out, "PNG")
    return out.getvalue()
