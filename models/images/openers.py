"""Opening images of all formats, so that decoding handles them alike: pixels, profile, orientation.

Imported by decoding processes: decoders other than those of JPEG, PNG and WebP are imported with their first image.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ...errors import BadInput, RunFailed
from ...manifests.files.image_types import IMAGE_TYPES
from ...manifests.status import Status
from .cicp import profile_of
from .formats import Format
from .headers.bmp import bmp_profile
from .headers.gif import read_gif
from .headers.heif import HeifPicture, read_heif
from .headers.jp2 import read_jp2
from .headers.structure import UnusableImage, unsupported
from .png import open_png

DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error)
_EXIF_ERRORS = (*DECODE_ERRORS, LookupError, TypeError, AttributeError)
# What decoders of the further formats raise of damaged files besides.
_THEIR_ERRORS = (LookupError, TypeError, AttributeError, RuntimeError, NotImplementedError)
_EXIF_ORIENTATION = 0x0112
# Modes of pixels that decoding converts rightly. Of the common formats, Pillow opens no others.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L")
# Pillow warns of every photo with damaged EXIF, once per process, in the middle of the progress display; of images over
# a limit that is not ours; of icons that give two sizes.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(TiffImagePlugin|IcoImagePlugin)")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(slots=True)
class Opened:
    """An image that is opened but not decoded. ``image``: as Pillow opened it, with its profile in ``info``.

    ``turned``: the EXIF orientation to apply to the decoded pixels; None if the image's EXIF has it. ``box``: the part
    of a larger canvas (left, top, right, bottom) that the pixels fill.
    """

    image: ImageFile
    turned: int | None = 1
    box: tuple[int, int, int, int] | None = None

    def draft(self, mode: str, size: tuple[int, int]) -> tuple[str, tuple[float, float, float, float]] | None:
        """As Pillow's, of JPEGs alone: other decoders would take an embedded thumbnail, which may show another crop."""
        return self.image.draft(mode, size) if isinstance(self.image, JpegImageFile) else None

    def load(self) -> Image.Image:
        """The decoded pixels, as stored. Raises UnusableImage and :data:`DECODE_ERRORS`."""
        with _damage():
            self.image.load()
        if self.box is None or self.box == (0, 0, *self.image.size):
            return self.image
        canvas = Image.new("RGBA", self.image.size)  # clear, where Pillow has the first color of the palette
        canvas.paste(self.image.crop(self.box).convert("RGBA"), self.box[:2])
        return canvas

    def orientation(self) -> int:
        """EXIF orientation, 1 to 8, of what :meth:`load` returns; of a PNG, decodes it.

        A damaged EXIF block says nothing about the pixels, so it counts as upright.
        """
        if self.turned is not None:
            return self.turned
        try:
            value = self.image.getexif().get(_EXIF_ORIENTATION, 1)
        except _EXIF_ERRORS:
            return 1
        return value if value in range(1, 9) else 1


def open_image(data: bytes, kind: Format) -> Opened:
    """Open an image whose header was read. Raises UnusableImage, :data:`DECODE_ERRORS`, and RunFailed if the package
    that decodes it is not installed."""
    if kind in _COMMON:
        return Opened(_COMMON[kind](data), None)
    with _damage():
        opened = _FURTHER[kind](data)
    if opened.image.mode not in _MODES:
        words = IMAGE_TYPES[kind].words
        raise unsupported(f"{words} in Pillow's mode {opened.image.mode}, which is not converted")
    return opened


@contextmanager
def _damage() -> Iterator[None]:
    """What decoders raise of damaged files, as :data:`DECODE_ERRORS`."""
    try:
        yield
    except Image.DecompressionBombError as error:  # of an image within another, such as an icon's
        raise UnusableImage(Status.TOO_LARGE, str(error)) from None
    except _THEIR_ERRORS as error:
        raise ValueError(str(error) or type(error).__name__) from None


def missing(kind: str) -> str | None:
    """Why a format cannot be decoded here, and how to install what does; None if it can."""
    known = IMAGE_TYPES[kind]
    if not known.module or find_spec(known.module) is not None:
        return None
    return f"{kind} needs the package {known.module}: pip install 'capipe[{known.extra}]'"


def check_decoders(kinds: Collection[str]) -> None:
    """Raises BadInput, naming the extra, if a format cannot be decoded here."""
    for kind in kinds:
        if kind in IMAGE_TYPES and (reason := missing(kind)) is not None:
            raise BadInput(f"--accept {reason}; or leave out {kind}")


def decodable() -> frozenset[str]:
    """The formats that can be decoded here."""
    return frozenset(kind for kind in IMAGE_TYPES if missing(kind) is None)


def _not_installed(kind: Format, error: ImportError) -> RunFailed:
    return RunFailed(f"there are {kind} images, and {missing(kind) or error}; then run it again")


def _bmp(data: bytes) -> Opened:
    from PIL.BmpImagePlugin import BmpImageFile

    return _with_profile(BmpImageFile(io.BytesIO(data)), bmp_profile(data))


def _ico(data: bytes) -> Opened:
    from PIL.IcoImagePlugin import IcoImageFile

    return Opened(IcoImageFile(io.BytesIO(data)))


def _gif(data: bytes) -> Opened:
    """The first frame, on its canvas: what a viewer shows first, whatever happens to it later."""
    from PIL.GifImagePlugin import GifImageFile

    header = read_gif(data)
    opened = _with_profile(GifImageFile(io.BytesIO(data)), header.profile)
    opened.box = header.box
    return opened


def _tiff(data: bytes) -> Opened:
    """The first page. Pillow turns it upright while decoding."""
    from PIL.TiffImagePlugin import TiffImageFile

    return Opened(TiffImageFile(io.BytesIO(data)))


def _jp2(data: bytes) -> Opened:
    from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile

    return _with_profile(Jpeg2KImageFile(io.BytesIO(data)), read_jp2(data).profile)


def _avif(data: bytes) -> Opened:
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there are as many decoding processes as cores
    picture = read_heif(data)
    opened = _with_code_points(AvifImagePlugin.AvifImageFile(io.BytesIO(data)), picture)
    opened.turned = picture.orientation
    return opened


def _heic(data: bytes) -> Opened:
    """The primary image, which libheif turns upright while decoding."""
    try:
        from pillow_heif import options
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError as error:
        raise _not_installed("heic", error) from None
    options.DECODE_THREADS = 1
    return _with_code_points(HeifImageFile(io.BytesIO(data)), read_heif(data))


def _jxl(data: bytes) -> Opened:
    """Opening decodes it. libjxl turns it upright, but for a JPEG that it restores from a recompressed one."""
    try:
        from pillow_jxl import JpegXLImagePlugin
    except ImportError as error:
        raise _not_installed("jxl", error) from None
    JpegXLImagePlugin.DECODE_THREADS = 0

    try:
        image = JpegXLImagePlugin.JXLImageFile(io.BytesIO(data))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a bug in its Rust code raises; no Exception
            raise
        raise ValueError(f"its decoder failed: {error}") from None
    if image.mode.startswith("RGB") and (image.info.get("icc_profile") or b"")[16:20] == b"CMYK":
        raise unsupported("a JPEG XL image in CMYK, of which its decoder leaves out the black")
    return Opened(image, None if image.jpeg else 1)


def _with_profile(image: ImageFile, profile: bytes) -> Opened:
    if profile:
        image.info["icc_profile"] = profile
    return Opened(image)


def _with_code_points(image: ImageFile, picture: HeifPicture) -> Opened:
    """A profile in the file takes precedence over code points."""
    profile = None if picture.cicp is None or picture.profiled else profile_of(*picture.cicp)
    return _with_profile(image, profile or b"")


# Opened by class instead of Image.open: the format is known, Image.open's own pixel limit raises or warns at sizes that
# are not ours, and it would read a phone's two-image JPEG (MPO) as an animation.
_COMMON: Mapping[Format, Callable[[bytes], ImageFile]] = {
    "jpg": lambda data: JpegImageFile(io.BytesIO(data)),
    "png": open_png,
    "webp": lambda data: WebPImageFile(io.BytesIO(data)),
}
_FURTHER: Mapping[Format, Callable[[bytes], Opened]] = {
    "avif": _avif,
    "gif": _gif,
    "bmp": _bmp,
    "tiff": _tiff,
    "heic": _heic,
    "jxl": _jxl,
    "jp2": _jp2,
    "ico": _ico,
}
