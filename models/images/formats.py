"""Image headers, read from the structure of encoded bytes alone: nothing is decoded, no pixel is allocated.

So a pixel bomb costs a few microseconds, and files are identified by content, never by name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ...manifests.files.image_types import IMAGE_TYPES
from ...manifests.status import Status
from .headers.bmp import read_bmp, read_ico
from .headers.gif import read_gif
from .headers.heif import HIGH_RANGE, brand, read_heif
from .headers.jp2 import read_jp2
from .headers.jxl import read_jxl
from .headers.structure import Structure, UnusableImage, unsupported
from .headers.tiff import read_tiff

Format = Literal["jpg", "png", "webp", "avif", "gif", "bmp", "tiff", "heic", "jxl", "jp2", "ico"]

HEAD_BYTES = 4096  # enough bytes to identify any file's kind
MAX_JPEG_SCANS = 500  # every scan is a pass over the whole image; encoders write 1 to 20, bombs thousands

_PNG = b"\x89PNG\r\n\x1a\n"
_MAGIC: tuple[tuple[bytes, Format], ...] = (
    (b"\xff\xd8\xff", "jpg"),
    (_PNG, "png"),
    (b"GIF8", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),  # BigTIFF
    (b"MM\0+", "tiff"),
    (b"\0\0\1\0", "ico"),
    (b"\0\0\0\x0cjP  ", "jp2"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cJXL ", "jxl"),
    (b"BM", "bmp"),
)
# Other files found in web crawls, by their first bytes. Order matters only where one entry is a prefix of another.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ", "xz data"),
    (b"(\xb5/\xfd", "zstandard data"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "Arrow data"),
    (b"\xff\xff\xff\xff", "Arrow data"),  # the stream format, as `datasets` saves it
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer"),
    (b"\x7fELF", "a program"),
    (b"\x1aE\xdf\xa3", "a Matroska video"),
)
_MARKUP = re.compile(rb"<(svg|!doctype\s+html|html|head|body|\?xml|!--)", re.IGNORECASE)
# Start-of-frame markers of a JPEG: those libjpeg decodes at 8 bits a sample, and those it does not.
_SOF_DECODED = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
_SOF_PROGRESSIVE = {0xC2, 0xCA}
_SOF_OTHERS = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}


@dataclass(frozen=True, slots=True)
class ImageProblem:
    """Why an image cannot be used: the row's ``status`` and ``error``."""

    status: Status
    reason: str


@dataclass(frozen=True, slots=True)
class Header:
    """``width`` and ``height`` in pixels as stored (before rotation); ``frames`` > 1 for an animation, or for pages.

    ``complete``: whether the file contains the end of its structure; known where a format's structure says it.
    """

    format: Format
    width: int
    height: int
    frames: int = 1
    complete: bool = True


def sniff(data: bytes) -> Format | ImageProblem:
    """The format of an image by its first bytes; for other files a problem that names what they look like."""
    if not data:
        return ImageProblem(Status.CORRUPT, "zero bytes")
    kind = _format(data[:HEAD_BYTES])
    if kind is not None:
        return kind
    if len(data) < 12 and (_PNG.startswith(data) or data[:2] == b"\xff\xd8" or data[:4] == b"RIFF"):
        return ImageProblem(Status.CORRUPT, f"truncated: only {len(data)} bytes")
    if not data[:HEAD_BYTES].strip(b"\0"):
        return ImageProblem(Status.CORRUPT, f"the first {min(len(data), HEAD_BYTES)} bytes are zeros")
    return ImageProblem(Status.UNSUPPORTED, f"{_UNCOMMON}: {_describe(data[:HEAD_BYTES])}")


_UNCOMMON = "not a JPEG, PNG or WebP image"


def not_accepted(kind: Format) -> ImageProblem:
    """The problem of a sound image in a format that is not accepted."""
    return ImageProblem(Status.UNSUPPORTED, f"{_UNCOMMON}: {IMAGE_TYPES[kind].words}")


def no_image(head: bytes) -> str | None:
    """Description of a file that is no image at all, by its first bytes.

    None for images, also damaged ones and those in unsupported formats.
    """
    sniffed = sniff(head)
    if not isinstance(sniffed, ImageProblem) or sniffed.status is not Status.UNSUPPORTED:
        return None
    kind = _describe(head[:HEAD_BYTES])
    return None if kind.endswith((" drawing", "Photoshop file")) else kind


def _format(head: bytes) -> Format | None:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    by_brand = brand(head)
    if by_brand is not None:
        return "avif" if by_brand == "avif" else "heic"
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)


def _describe(head: bytes) -> str:
    for magic, name in _OTHERS:
        if head.startswith(magic):
            return name
    if head[4:8] == b"ftyp":
        return "an MP4 or QuickTime file"
    if head[257:262] == b"ustar":
        return "a tar archive"
    markup = _MARKUP.search(head) if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") else None
    if markup and b"<svg" in head.lower():
        return "an SVG drawing"
    if markup:
        return "an XML file" if markup[1] == b"?xml" else "an HTML page"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # a character cut by the end of the head is still text
            return f"unknown data (starts with {head[:8].hex(' ')})"
        text = head[: error.start].decode("utf-8")
    if any(not c.isprintable() and not c.isspace() for c in text):
        return f"unknown data (starts with {head[:8].hex(' ')})"
    return "JSON text" if text.lstrip()[:1] in ("{", "[") else "plain text"


def read_header(data: bytes) -> Header | ImageProblem:
    """Format, stored size and number of frames from the headers; files that end too early are corrupt."""
    kind = sniff(data)
    if isinstance(kind, ImageProblem):
        return kind
    try:
        header = _READERS[kind](data) if kind in _READERS else Header(kind, *_STRUCTURES[kind](data))
    except UnusableImage as problem:
        return ImageProblem(problem.status, problem.reason)
    except (struct.error, IndexError):
        return ImageProblem(Status.CORRUPT, f"truncated: the file ends in the headers ({len(data)} bytes)")
    if isinstance(header, Header) and (header.width < 1 or header.height < 1):
        return ImageProblem(Status.CORRUPT, f"the header gives a size of {header.width}x{header.height}")
    return header


def _jpeg_header(data: bytes) -> Header | ImageProblem:
    at = 2
    while True:
        if data[at] != 0xFF:
            return ImageProblem(Status.CORRUPT, f"no JPEG marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without data
            at += 2
        elif marker in _SOF_DECODED:
            precision, height, width = struct.unpack_from(">BHH", data, at + 4)
            if precision != 8:
                return ImageProblem(Status.UNSUPPORTED, f"a JPEG with {precision} bits a sample")
            if marker in _SOF_PROGRESSIVE and (scans := data.count(b"\xff\xda", at)) > MAX_JPEG_SCANS:
                return ImageProblem(Status.UNSUPPORTED, f"a JPEG with {scans} scans (limit {MAX_JPEG_SCANS})")
            return Header("jpg", width, height)
        elif marker in _SOF_OTHERS:
            return ImageProblem(Status.UNSUPPORTED, "a lossless or hierarchical JPEG")
        elif marker in (0xD9, 0xDA):
            return ImageProblem(Status.CORRUPT, "a JPEG without a frame header")
        else:
            (length,) = struct.unpack_from(">H", data, at + 2)
            at += 2 + length


def _png_header(data: bytes) -> Header | ImageProblem:
    """Walks all chunks: Pillow accepts a PNG whose last bytes are missing."""
    if data[12:16] != b"IHDR":
        return ImageProblem(Status.CORRUPT, "a PNG whose first chunk is not IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    frames, at = 1, 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        if kind == b"IEND":
            return Header("png", width, height, frames)
        if kind == b"acTL":
            (frames,) = struct.unpack_from(">I", data, at + 8)
        at += 12 + length
    # The size still counts: a bomb must be reported as one even where its file holds nothing but a header.
    return Header("png", width, height, frames, complete=False)


def _webp_header(data: bytes) -> Header | ImageProblem:
    (claimed,) = struct.unpack_from("<I", data, 4)
    if claimed + 8 > len(data):
        return ImageProblem(Status.CORRUPT, f"truncated: {len(data)} of {claimed + 8} bytes")
    size: tuple[int, int] | None = None
    frames, animated, at = 0, False, 12
    while at + 8 <= claimed + 8:
        kind = data[at : at + 4]
        (length,) = struct.unpack_from("<I", data, at + 4)
        body = at + 8
        if kind == b"VP8X":
            animated = bool(data[body] & 2)
            size = _uint24(data, body + 4) + 1, _uint24(data, body + 7) + 1
        elif kind == b"VP8 " and size is None:
            width, height = struct.unpack_from("<HH", data, body + 6)
            size = width & 0x3FFF, height & 0x3FFF
        elif kind == b"VP8L" and size is None:
            (packed,) = struct.unpack_from("<I", data, body + 1)
            size = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        elif kind == b"ANMF":
            frames += 1
        at = body + length + (length & 1)
    if size is None:
        return ImageProblem(Status.CORRUPT, "a WebP without image data")
    return Header("webp", *size, frames if animated else 1)


def _uint24(data: bytes, at: int) -> int:
    return data[at] | data[at + 1] << 8 | data[at + 2] << 16


def _heif_structure(data: bytes) -> Structure:
    """Also refuses colors that have no place in sRGB, and what only some decoders crop."""
    picture = read_heif(data)
    kind = "an AVIF image" if brand(data[:HEAD_BYTES]) == "avif" else "a HEIF image"
    bright = None if picture.cicp is None or picture.profiled else HIGH_RANGE.get(picture.cicp[1])
    if bright is not None:
        raise unsupported(f"{kind} with a high dynamic range ({bright})")
    if picture.cropped and kind == "an AVIF image":
        raise unsupported("an AVIF image with a clean aperture, which its decoder ignores")
    return picture.structure


_READERS: Mapping[Format, Callable[[bytes], Header | ImageProblem]] = {
    "jpg": _jpeg_header,
    "png": _png_header,
    "webp": _webp_header,
}
_STRUCTURES: Mapping[Format, Callable[[bytes], Structure]] = {
    "avif": _heif_structure,
    "heic": _heif_structure,
    "gif": lambda data: read_gif(data).structure,
    "bmp": read_bmp,
    "ico": read_ico,
    "tiff": read_tiff,
    "jxl": read_jxl,
    "jp2": lambda data: read_jp2(data).structure,
}
