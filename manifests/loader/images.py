"""What a sample has as its image: the bytes of the tar, or pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from ...errors import BadInput

Decode = Literal["pil", "array"] | Callable[[bytes], Any] | None
_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error),
    Image.DecompressionBombError,
)


class Undecodable(Exception):
    """Image bytes that Pillow cannot decode."""


def decoder(decode: Decode) -> Callable[[bytes], Any] | None:
    """The function of an image's bytes, None if they stay as they are. Raises BadInput for another word."""
    if decode is None or callable(decode):
        return decode
    known: dict[str, Callable[[bytes], Any]] = {"pil": pil, "array": array}
    if decode not in known:
        raise BadInput(f"decode={decode!r}: None for bytes, 'pil', 'array' or a function of bytes")
    return known[decode]


def pil(data: bytes) -> Image.Image:
    """A PIL image: upright by its EXIF, in RGB. Profiles and transparency are ignored, as other loaders do.

    Raises Undecodable.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image) if _is_turned(image) else image  # which copies in any case
            return upright.convert("RGB")
    except _ERRORS as error:
        raise Undecodable(str(error) or type(error).__name__) from None


def _is_turned(image: Image.Image) -> bool:
    """True if EXIF says that an image is to be turned. Damaged EXIF says nothing about its pixels."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except (*_ERRORS, LookupError, TypeError, AttributeError):
        return False


def array(data: bytes) -> npt.NDArray[np.uint8]:
    """The same as uint8 of shape ``(height, width, 3)``."""
    return np.array(pil(data), dtype=np.uint8)
