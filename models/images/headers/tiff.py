"""TIFF and BigTIFF: the first page's size and kind of pixels, the number of pages (TIFF 6.0; libtiff's BigTIFF).

Kinds that Pillow would read with other levels than are meant, or not at all, are refused here by name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ....manifests.status import Status
from .structure import MAX_FRAMES, Structure, UnusableImage, corrupt, unsupported

MAX_TILE_PIXELS = 1 << 26  # of one tile, which is decoded whole
MAX_ENTRIES = 4096  # tags of a page
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_STRIP_OFFSETS, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 273, 279, 322, 323, 324, 325
_SAMPLE_FORMAT = 339
_EXTENTS = ((_STRIP_OFFSETS, _STRIP_BYTES), (_TILE_OFFSETS, _TILE_BYTES))
_WANTED = {_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT, _SAMPLE_FORMAT}
_WANTED |= {tag for pair in _EXTENTS for tag in pair}
_FORMATS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # of unsigned numbers
_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946}  # none, fax, LZW, JPEG, Deflate, PackBits
_PHOTOMETRICS = {0, 1, 2, 3, 5, 6}  # gray (two kinds), RGB, palette, CMYK, YCbCr
_REDUCED, _MASK = 1, 4  # bits of the kind of a page: a smaller copy, a mask

Tags = dict[int, tuple[int, ...]]


class _Layout(NamedTuple):
    """How numbers and directories are written: byte order, and the formats of a directory's parts."""

    order: str
    number: str
    entry: str
    offset: str


def read_tiff(data: bytes) -> Structure:
    """Raises UnusableImage, struct.error."""
    order = "<" if data[:2] == b"II" else ">"
    (version,) = struct.unpack_from(f"{order}H", data, 2)
    layout = _Layout(order, "Q", "HHQ", "Q") if version == 43 else _Layout(order, "H", "HHI", "I")
    (first,) = struct.unpack_from(order + layout.offset, data, 8 if version == 43 else 4)
    tags, following = _directory(data, first, layout)
    width, height = _number(tags, _WIDTH), _number(tags, _HEIGHT)
    _refuse_unreadable(tags)
    extents = [
        (offset, size)
        for offsets, sizes in _EXTENTS
        for offset, size in zip(tags.get(offsets, ()), tags.get(sizes, ()), strict=False)
    ]
    complete = all(offset + size <= len(data) for offset, size in extents)
    pages, sound = 1, True
    for page in _pages(data, first, following, layout):
        if page is None:
            sound = False
        else:
            pages += not page
    return Structure(width, height, pages, complete and sound)


def _refuse_unreadable(tags: Tags) -> None:
    bits, photometric = max(tags.get(_BITS, (1,))), _number(tags, _PHOTOMETRIC, 0)
    compression = _number(tags, _COMPRESSION, 1)
    if _number(tags, _SUBFILE, 0) & _REDUCED:
        raise unsupported("a TIFF that begins with a thumbnail, as raw files of cameras do")
    if compression not in _COMPRESSIONS:
        raise unsupported(f"a TIFF with compression {compression}")
    if photometric not in _PHOTOMETRICS:
        raise unsupported(f"a TIFF with photometric interpretation {photometric}")
    if bits not in (1, 2, 4, 8, 16) or (bits > 8 and photometric == 0):
        raise unsupported(f"a TIFF with {bits} bits a sample and photometric interpretation {photometric}")
    if any(kind != 1 for kind in tags.get(_SAMPLE_FORMAT, ())):
        raise unsupported("a TIFF of signed or floating-point numbers")
    across, down = _number(tags, _TILE_WIDTH, 0), _number(tags, _TILE_HEIGHT, 0)
    if across * down > MAX_TILE_PIXELS:
        raise UnusableImage(Status.TOO_LARGE, f"a TIFF with tiles of {across}x{down}")


def _pages(data: bytes, first: int, following: int, layout: _Layout) -> Iterator[bool | None]:
    """For each further page whether it is a smaller copy or a mask; None at the end of a cut file."""
    seen = {first}
    while following:
        if following in seen:
            raise corrupt("a TIFF whose pages are in a circle")
        seen.add(following)
        if len(seen) > MAX_FRAMES:
            raise unsupported(f"a TIFF of over {MAX_FRAMES} pages")
        try:
            tags, following = _directory(data, following, layout, only=_SUBFILE)
        except struct.error:
            yield None
            return
        yield bool(_number(tags, _SUBFILE, 0) & (_REDUCED | _MASK))


def _directory(data: bytes, at: int, layout: _Layout, only: int | None = None) -> tuple[Tags, int]:
    """Wanted tags of a page, and the offset of the next page. ``only``: this tag, if it is the first one."""
    (count,) = struct.unpack_from(layout.order + layout.number, data, at)
    if count > MAX_ENTRIES:
        raise corrupt(f"a TIFF page with {count} tags")
    start, size = at + struct.calcsize("=" + layout.number), struct.calcsize("=" + layout.entry + layout.offset)
    tags: Tags = {}
    for number in range(count if only is None else min(count, 1)):
        tag, kind, values = struct.unpack_from(layout.order + layout.entry, data, start + number * size)
        if tag not in _WANTED or kind not in _FORMATS or only not in (None, tag):
            continue
        place = start + number * size + struct.calcsize("=" + layout.entry)
        if values * struct.calcsize("=" + _FORMATS[kind]) > struct.calcsize("=" + layout.offset):
            (place,) = struct.unpack_from(layout.order + layout.offset, data, place)
        if values > len(data):
            raise struct.error("more values than bytes")
        tags[tag] = struct.unpack_from(f"{layout.order}{values}{_FORMATS[kind]}", data, place)
    (following,) = struct.unpack_from(layout.order + layout.offset, data, start + count * size)
    return tags, following


def _number(tags: Tags, tag: int, default: int | None = None) -> int:
    values = tags.get(tag)
    if values:
        return values[0]
    if default is None:
        raise corrupt("a TIFF whose first page has no size")
    return default
