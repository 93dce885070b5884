"""Conversion of images in formats that are not kept to PNG (`capipe ingest --convert`).

Still images only. What Pillow or one of its plugins can read depends on the installation; other files keep their
reason.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from importlib import import_module

from PIL import Image
from PIL.ImageFile import ImageFile

from ...manifests.status import Status
from .decode import DECODE_ERRORS, ImageLimits, as_shown, refusal
from .formats import Header, ImageProblem, described

# By the description of :func:`.formats.described`: short name, module that reads it, Pillow's name for it.
_READERS = {
    "a GIF image": ("gif", "PIL.GifImagePlugin", "GIF"),
    "a BMP image": ("bmp", "PIL.BmpImagePlugin", "BMP"),
    "a TIFF image": ("tiff", "PIL.TiffImagePlugin", "TIFF"),
    "an icon (ICO)": ("ico", "PIL.IcoImagePlugin", "ICO"),
    "a JPEG 2000 image": ("jp2", "PIL.Jpeg2KImagePlugin", "JPEG2000"),
    "an AVIF image": ("avif", "PIL.AvifImagePlugin", "AVIF"),
    "a HEIF image": ("heif", "pillow_heif", "HEIF"),
}
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L")
_UNREADABLE = (*DECODE_ERRORS, Image.DecompressionBombError, NotImplementedError, LookupError, RuntimeError)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # we apply our own pixel limit


@dataclass(frozen=True, slots=True)
class Converted:
    """``data``: a PNG, upright, in sRGB, 8-bit, transparency over white. ``format``: the original format."""

    data: bytes
    format: str


def is_convertible(data: bytes) -> bool:
    """Whether a file looks like a format that can be converted to PNG, still or animated."""
    return described(data) in _READERS


def to_png(data: bytes, limits: ImageLimits) -> Converted | ImageProblem | None:
    """The image as a PNG, or why not; None for files that are no image in one of these formats."""
    kind = described(data)
    if kind not in _READERS:
        return None
    name, module, pillows = _READERS[kind]
    try:
        reader = import_module(module)
        if module == "pillow_heif":
            reader.register_heif_opener()
        image = Image.OPEN[pillows][0](io.BytesIO(data), "")
    except ImportError:
        return ImageProblem(
            Status.UNSUPPORTED, f"{kind}; to convert it, install the package {module.partition('.')[0]}"
        )
    except _UNREADABLE as error:
        return _undecodable(kind, error)
    problem = _refusal(image, kind, limits, len(data))
    if problem is not None:
        return problem
    try:
        return Converted(_png(image), name)
    except Image.DecompressionBombError as error:
        return ImageProblem(Status.TOO_LARGE, f"{kind}: {error}")
    except _UNREADABLE as error:
        return _undecodable(kind, error)


def _refusal(image: ImageFile, kind: str, limits: ImageLimits, length: int) -> ImageProblem | None:
    problem = refusal(Header("png", *image.size), limits, length)
    if problem is not None:
        return problem
    try:
        frames = getattr(image, "n_frames", 1)
    except _UNREADABLE as error:
        return _undecodable(kind, error)
    if frames > 1:
        what = f"{kind} of {frames} pages" if kind == "a TIFF image" else f"animated image ({frames} frames)"
        return ImageProblem(Status.UNSUPPORTED, what)
    if image.mode not in _MODES:
        return ImageProblem(Status.UNSUPPORTED, f"{kind} in Pillow's mode {image.mode}, which is not converted")
    return None


def _png(image: ImageFile) -> bytes:
    shown = as_shown(image)
    shown.info = {}
    out = io.BytesIO()
    shown.save(out, "PNG")
    return out.getvalue()


def _undecodable(kind: str, error: Exception) -> ImageProblem:
    return ImageProblem(Status.CORRUPT, f"{kind} that cannot be decoded: {error or type(error).__name__}")
