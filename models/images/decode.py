"""Decoding of image bytes: a verdict, a perceptual hash or model-ready pixels. Pure functions, nothing is cached.

Pixels are what a viewer shows: upright, in sRGB, eight bits per channel, transparency over white; of an animation the
first frame, of several pages the first.

JPEGs are scaled inside the DCT while they are decoded, which is where most of the time goes. Imported by decoding
processes, so it must stay light: numpy and Pillow, no torch.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...manifests.files.image_types import COMMON, FURTHER
from ...manifests.status import Status
from .encoding import Encoding, encoded
from .formats import Format, Header, ImageProblem, not_accepted, read_header, sniff
from .grid import ImageGrid
from .headers.structure import UnusableImage
from .icc import Conversion, srgb_conversion
from .openers import DECODE_ERRORS, Opened, open_image
from .png import may_be_turned

Pixels = npt.NDArray[np.uint8]

MAX_GRID_ASPECT = 200.0  # Qwen's processors refuse longer strips
ANIMATED = "animated"  # among accepted formats: the first frames of animated PNG and WebP images
#: What stages take of shards that capipe wrote: `ingest` decided what is in them.
EVERYTHING = frozenset((*COMMON, *FURTHER, ANIMATED))

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNREADABLE = (*DECODE_ERRORS, UnusableImage)
_PLAIN_MODES = ("RGB", "L", "P", "1")
_PNG_DEPTH_AT = 24  # offset of the bits per channel
_LOSSLESS_PIXELS = 4_000_000  # PNGs of this many pixels are 5 to 10 MB
_HASH_SIDE, _HASH_BITS = 32, 8
# The first 8 rows of the 32-point DCT-II, unnormalised.
_DCT: npt.NDArray[np.float64] = 2 * np.cos(
    np.pi * np.outer(np.arange(_HASH_BITS), 2 * np.arange(_HASH_SIDE) + 1) / (2 * _HASH_SIDE)
)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits for accepted images: sides in pixels, ``max_aspect`` is the longer side over the shorter.

    ``accept``: names of formats, and :data:`ANIMATED`. Of formats beyond the common three, first frames and pages are
    always taken.
    """

    max_image_pixels: int = 100_000_000
    min_side: int = 16
    max_aspect: float = MAX_GRID_ASPECT
    accept: frozenset[str] = frozenset(COMMON)


@dataclass(frozen=True, slots=True)
class Transcoded:
    """An image encoded anew: ``data``. ``original``: the format that it had."""

    data: bytes
    original: Format


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """A valid image. ``width`` and ``height`` are upright (after rotation); ``phash`` is 16 hex digits.

    ``frames``: of which it is the first. ``transcoded``: what the other fields describe, if it is not the image given.
    """

    format: Format
    width: int
    height: int
    phash: str
    frames: int = 1
    transcoded: Transcoded | None = None


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """An image decoded small. ``image`` is RGB; ``width`` and ``height`` are those of the whole image, upright."""

    image: Image.Image
    width: int
    height: int


def check(data: bytes, limits: ImageLimits, encoding: Encoding | None = None) -> ImageInfo | ImageProblem:
    """Decode all of ``data`` (every entropy-coded byte, to detect truncation), scaled down as far as hashing allows.

    ``encoding``: how to encode images anew that not all readers take: other formats than the common three, animations.
    """
    header = _accept(data, limits)
    if isinstance(header, ImageProblem):
        return header
    if encoding is not None and (header.format not in COMMON or header.frames > 1):
        return _transcoded(data, header, limits, encoding)
    try:
        opened = _opened(data, header, limits)
        conversion = srgb_conversion(opened.image)
        size = opened.image.size
        opened.draft("RGB" if conversion else "L", (_HASH_SIDE, _HASH_SIDE))
        image = opened.load()
        orientation = opened.orientation()
        plain = image.mode == "L" and not image.has_transparency_data and not conversion
        grey = image if plain else _to_rgb(image, conversion).convert("L")
    except _UNREADABLE as error:
        return _undecodable(error)
    width, height = size if orientation < 5 else size[::-1]
    return ImageInfo(header.format, width, height, phash(_upright(grey, orientation)), header.frames)


def _transcoded(data: bytes, header: Header, limits: ImageLimits, encoding: Encoding) -> ImageInfo | ImageProblem:
    try:
        stored = encoded(_as_shown(_opened(data, header, limits)), encoding)
    except _UNREADABLE as error:
        return _undecodable(error)
    found = check(stored, limits)
    if isinstance(found, ImageProblem):
        return found
    return replace(found, frames=header.frames, transcoded=Transcoded(stored, header.format))


def decode_upright(data: bytes, limits: ImageLimits) -> Image.Image | ImageProblem:
    """The whole image at full size: upright, RGB, transparency over white."""
    whole = thumbnail(data, limits, None)
    return whole if isinstance(whole, ImageProblem) else whole.image


def thumbnail(data: bytes, limits: ImageLimits, side: int | None) -> Thumbnail | ImageProblem:
    """The whole image, upright and in RGB, as small as decoding makes it without a side under ``side`` pixels."""
    header = _accept(data, limits)
    if isinstance(header, ImageProblem):
        return header
    try:
        opened = _opened(data, header, limits)
        size = opened.image.size
        if side is not None:
            opened.draft("RGB", (side, side))
        shown = _as_shown(opened)
    except _UNREADABLE as error:
        return _undecodable(error)
    return Thumbnail(shown, *(size if opened.orientation() < 5 else size[::-1]))


def _opened(data: bytes, header: Header, limits: ImageLimits) -> Opened:
    """Raises UnusableImage, also for a size beyond the limits that only the decoder found, and DECODE_ERRORS."""
    opened = open_image(data, header.format)
    width, height = opened.image.size
    if (problem := _too_large(width, height, limits)) is not None:
        raise UnusableImage(problem.status, problem.reason)
    return opened


def _as_shown(opened: Opened) -> Image.Image:
    """An opened image, upright and in RGB. Raises UnusableImage, DECODE_ERRORS."""
    conversion = srgb_conversion(opened.image)
    image = opened.load()
    return _upright(_to_rgb(image, conversion), opened.orientation())


def decode_rgb(data: bytes, grid: ImageGrid, limits: ImageLimits, *, dct_scaling: bool = True) -> Pixels | ImageProblem:
    """Upright RGB pixels ``(height, width, 3)`` on the model's grid, so that its own processor need not resize.

    ``dct_scaling=False`` decodes JPEGs at full size first: slower, for models that are sensitive to the difference.
    """
    header = _accept(data, limits)
    if isinstance(header, ImageProblem):
        return header
    if max(header.width, header.height) > MAX_GRID_ASPECT * min(header.width, header.height):
        return _too_thin(header, MAX_GRID_ASPECT)
    try:
        opened = _opened(data, header, limits)
        orientation = opened.orientation()
        across, down = opened.image.size
        if orientation >= 5:
            width, height = grid_size(across, down, grid)
        else:
            height, width = grid_size(down, across, grid)
        drafted = opened.draft("RGB", (width, height)) if dct_scaling else None
        conversion = srgb_conversion(opened.image)
        rgb = _to_rgb(opened.load(), conversion)
    except _UNREADABLE as error:
        return _undecodable(error)
    if rgb.size != (width, height):
        # Half of 333 pixels are decoded to 167, of which 166.5 are image: without the box everything would shift.
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC, box=drafted[1] if drafted else None)
    return np.array(_upright(rgb, orientation), dtype=np.uint8, order="C")


def is_plain(data: bytes) -> bool:
    """Whether all readers show ``data`` as it is shown here: a common format, upright, sRGB, eight bits, no
    transparency, not CMYK, no animation.

    Decodes only where metadata may rotate the image. True for what cannot be opened: there is nothing to show.
    """
    header = read_header(data)
    if isinstance(header, ImageProblem) or not header.complete:
        return True
    if header.format not in COMMON or header.frames > 1:
        return False
    try:
        opened = open_image(data, header.format)
        image = opened.image
        odd = image.mode not in _PLAIN_MODES or image.has_transparency_data or srgb_conversion(image) is not None
        if header.format == "png":
            odd = odd or data[_PNG_DEPTH_AT] > 8
            turned = may_be_turned(data) and opened.orientation() != 1  # which decodes all of it
        else:
            turned = opened.orientation() != 1
    except _UNREADABLE:
        return True
    return not odd and not turned


def plain_copy(data: bytes, limits: ImageLimits) -> bytes | ImageProblem:
    """The image for readers that ignore EXIF, profile and transparency: ``data`` itself where it is plain.

    Otherwise a PNG, or a nearly lossless JPEG where a PNG would be many megabytes.
    """
    if is_plain(data):
        return data
    image = decode_upright(data, limits)
    if isinstance(image, ImageProblem):
        return image
    image.info = {}  # or Pillow would write the profile again
    out = io.BytesIO()
    if image.width * image.height <= _LOSSLESS_PIXELS:
        image.save(out, "PNG", compress_level=1)
    else:
        image.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def _accept(data: bytes, limits: ImageLimits) -> Header | ImageProblem:
    """Header of an image that may be decoded; problems that show without decoding are refused here."""
    kind = sniff(data)
    if isinstance(kind, ImageProblem):
        return kind
    if kind not in limits.accept:
        return not_accepted(kind)
    header = read_header(data)
    if isinstance(header, ImageProblem):
        return header
    return refusal(header, limits, len(data)) or header


def refusal(header: Header, limits: ImageLimits, length: int) -> ImageProblem | None:
    """Why an image with this header, in a file of ``length`` bytes, is not to be decoded; None where it may be."""
    width, height = header.width, header.height
    if (problem := _too_large(width, height, limits)) is not None:
        return problem
    if not header.complete:
        return ImageProblem(Status.CORRUPT, f"truncated: the file ends after {length} bytes, before its end mark")
    if header.frames > 1 and header.format in COMMON and ANIMATED not in limits.accept:
        return ImageProblem(Status.UNSUPPORTED, f"animated image ({header.frames} frames)")
    if min(width, height) < limits.min_side:
        return ImageProblem(Status.TOO_SMALL, f"{width}x{height}: the shorter side is under {limits.min_side} pixels")
    if max(width, height) > limits.max_aspect * min(width, height):
        return _too_thin(header, limits.max_aspect)
    return None


def _too_large(width: int, height: int, limits: ImageLimits) -> ImageProblem | None:
    if width * height <= limits.max_image_pixels:
        return None
    size = f"{width}x{height} is {width * height / 1e6:.0f} megapixels"
    return ImageProblem(Status.TOO_LARGE, f"{size}, over the limit of {limits.max_image_pixels / 1e6:g}")


def _too_thin(header: Header, limit: float) -> ImageProblem:
    reason = f"{header.width}x{header.height}: one side is more than {limit:g} times the other"
    return ImageProblem(Status.UNSUPPORTED, reason)


def _undecodable(error: Exception) -> ImageProblem:
    if isinstance(error, UnusableImage):
        return ImageProblem(error.status, error.reason)
    if "out of memory" in str(error):  # Pillow's message for failed allocations of libjpeg and zlib
        return ImageProblem(Status.READ_ERROR, f"cannot be decoded now: {error}")
    return ImageProblem(Status.CORRUPT, f"cannot be decoded: {error or type(error).__name__}")


def upright_header(data: bytes) -> Header | ImageProblem:
    """Format and size of an image as it is shown: upright. Decoded only where a PNG's metadata may rotate it."""
    header = read_header(data)
    if isinstance(header, ImageProblem) or (header.format == "png" and not may_be_turned(data)):
        return header
    try:
        turned = open_image(data, header.format).orientation() >= 5
    except _UNREADABLE as error:
        return _undecodable(error)
    return replace(header, width=header.height, height=header.width) if turned else header


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _to_rgb(image: Image.Image, conversion: Conversion | None) -> Image.Image:
    """As displayed: sRGB, transparency over white, 16 bits scaled to 8 (Pillow's convert clips them)."""
    if image.mode.startswith("I"):
        scaled = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        image = Image.fromarray(scaled.astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        paper = Image.new("RGB", image.size, (255, 255, 255))
        paper.paste(conversion.apply(rgba.convert("RGB")) if conversion else rgba, mask=rgba.getchannel("A"))
        return paper
    if conversion:
        return conversion.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def phash(grey: Image.Image) -> str:
    """64-bit perceptual hash of an ``L`` image as 16 hex digits; near-duplicates differ in few bits.

    The algorithm of ``imagehash.phash``: 32x32 (Lanczos), DCT-II, the 8x8 lowest frequencies thresholded at their
    median.
    """
    small = np.asarray(grey.resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = np.round(_DCT @ small @ _DCT.T, 3)  # rounded: in flat images all but the first are noise around zero
    ranked = np.sort(low, axis=None)
    median = (ranked[_HASH_BITS**2 // 2 - 1] + ranked[_HASH_BITS**2 // 2]) / 2  # np.median takes ten times as long
    return np.packbits(low > median).tobytes().hex()


def grid_size(height: int, width: int, grid: ImageGrid) -> tuple[int, int]:
    """``(height, width)`` on the grid by Qwen's smart-resize rule: near-equal aspect, multiples of ``factor``.

    Where that rule's result breaks its own limits (thin strips, or limits so close that no rounding fits), the model's
    processor would resize again; there the size within the limits that is closest in aspect is used. Raises ValueError
    over an aspect of 200, or where no size fits the limits.
    """
    if max(height, width) > MAX_GRID_ASPECT * min(height, width):
        raise ValueError(f"{width}x{height}: one side is more than {MAX_GRID_ASPECT:g} times the other")
    factor = grid.factor
    rows, columns = round(height / factor), round(width / factor)
    area = rows * columns * factor**2
    if area > grid.max_pixels:
        shrink = math.sqrt(height * width / grid.max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif area < grid.min_pixels:
        grow = math.sqrt(grid.min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    if not grid.min_pixels <= rows * columns * factor**2 <= grid.max_pixels:
        rows, columns = _nearest_cells(height / width, grid)
    return rows * factor, columns * factor


def _nearest_cells(aspect: float, grid: ImageGrid) -> tuple[int, int]:
    """Rows and columns within the grid's limits whose ratio is closest to ``aspect``; of equals, the largest."""
    low, high = -(-grid.min_pixels // grid.factor**2), grid.max_pixels // grid.factor**2
    best: tuple[float, int, int, int] | None = None
    for rows in range(1, high + 1):
        first, last = max(1, -(-low // rows)), high // rows
        if first > last:
            continue
        columns = min(max(round(rows / aspect), first), last)
        candidate = (abs(math.log(rows / columns / aspect)), -rows * columns, rows, columns)
        best = candidate if best is None or candidate < best else best
    if best is None:
        limits = f"{grid.min_pixels} to {grid.max_pixels} pixels"
        raise ValueError(f"no size in multiples of {grid.factor} has {limits}; widen the model's pixel limits")
    return best[2], best[3]
