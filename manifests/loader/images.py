"""What a sample has as its image: the bytes of the tar, or pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

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
    """A PIL image: upright by its EXIF, in RGB, of an animation the first frame. Profiles and transparency are ignored,
    as other loaders do. HEIC and JPEG XL need the packages of capipe's extras.

    Raises Undecodable.
    """
    try:
        with _opened(data) as image:
            upright = ImageOps.exif_transpose(image) if _is_turned(image) else image  # which copies in any case
            return upright.convert("RGB")
    except _ERRORS as error:
        raise Undecodable(str(error) or type(error).__name__) from None


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if not _register_plugins():
            raise
        return Image.open(io.BytesIO(data))


@cache
def _register_plugins() -> bool:
    """Register the plugins of formats that Pillow alone does not open, once in a process; True if there are any."""
    found = False
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        found = True
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401  which registers itself

        found = True
    return found


def _is_turned(image: Image.Image) -> bool:
    """True if EXIF says that an image is to be turned. Damaged EXIF says nothing about its pixels."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except (*_ERRORS, LookupError, TypeError, AttributeError):
        return False


def array(data: bytes) -> npt.NDArray[np.uint8]:
    """The same as uint8 of shape ``(height, width, 3)``."""
    return np.array(pil(data), dtype=np.uint8)
