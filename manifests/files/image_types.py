"""Image formats: names, extensions, media types, and what decodes them. The only list of them in the program."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageType:
    """A format. ``name``: in columns and options, and the extension of its members in tars.

    ``words``: in messages. ``others``: further extensions in file names. ``module`` and ``extra``: the module that
    decodes it and capipe's extra that installs it, where Pillow alone does not.
    """

    name: str
    media_type: str
    words: str
    others: tuple[str, ...] = ()
    module: str = ""
    extra: str = ""


IMAGE_TYPES: dict[str, ImageType] = {
    kind.name: kind
    for kind in (
        ImageType("jpg", "image/jpeg", "a JPEG image", ("jpeg", "jfif")),
        ImageType("png", "image/png", "a PNG image"),
        ImageType("webp", "image/webp", "a WebP image"),
        ImageType("avif", "image/avif", "an AVIF image"),
        ImageType("gif", "image/gif", "a GIF image"),
        ImageType("bmp", "image/bmp", "a BMP image"),
        ImageType("tiff", "image/tiff", "a TIFF image", ("tif",)),
        ImageType("heic", "image/heic", "a HEIF image", ("heif", "hif"), "pillow_heif", "heif"),
        ImageType("jxl", "image/jxl", "a JPEG XL image", (), "pillow_jxl", "jxl"),
        ImageType("jp2", "image/jp2", "a JPEG 2000 image"),
        ImageType("ico", "image/x-icon", "an icon (ICO)"),
    )
}

#: Formats that every stage takes, and every server and training loader reads.
COMMON = ("jpg", "png", "webp")
#: Formats that `capipe ingest --accept` adds.
FURTHER = tuple(name for name in IMAGE_TYPES if name not in COMMON)

#: Extensions of file names that may be images; their content decides.
IMAGE_EXTENSIONS = (*(extension for kind in IMAGE_TYPES.values() for extension in (kind.name, *kind.others)), "ppm")
