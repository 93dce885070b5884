"""AVIF and HEIF: size, rotation and colors of the picture that is shown (ISO/IEC 23008-12, AV1 Image File Format 1.1).

The picture is the primary item or, in an AVIF sequence, the first frame of its track.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from .boxes import Box, boxes, child, children, top_boxes
from .structure import Structure, corrupt, larger, unsupported

AVIF_BRANDS = {b"avif", b"avis"}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_COMMON_BRANDS = {b"mif1", b"msf1"}
#: Transfer characteristics of H.273 that eight bits of sRGB have no place for without tone mapping.
HIGH_RANGE = {9: "logarithmic", 10: "logarithmic", 16: "PQ", 18: "HLG"}
_SAMPLE_ENTRY = 78  # bytes of a visual sample entry before its boxes
_MAX_ITEMS = 65_536
_NONE = Structure(0, 0)
#: EXIF orientation by the quarter turns against the clock, then the axis of mirroring (None: not mirrored; 0: top and
#: bottom change places; 1: left and right). An item is turned first, then mirrored.
_ORIENTATIONS = {
    (0, None): 1,
    (0, 0): 4,
    (0, 1): 2,
    (1, None): 8,
    (1, 0): 5,
    (1, 1): 7,
    (2, None): 3,
    (2, 0): 2,
    (2, 1): 4,
    (3, None): 6,
    (3, 0): 7,
    (3, 1): 5,
}


@dataclass(slots=True)
class HeifPicture:
    """``orientation``: that of the file's own properties, as EXIF numbers it; EXIF's is ignored in these formats.

    ``cicp``: color primaries and transfer characteristics (H.273), where an ``nclx`` box gives them; ``profiled``: has
    an ICC profile; ``cropped``: has a clean aperture.
    """

    structure: Structure = _NONE
    orientation: int = 1
    cicp: tuple[int, int] | None = None
    profiled: bool = False
    cropped: bool = False
    _turns: int = field(default=0, repr=False)
    _mirror: int | None = field(default=None, repr=False)


def brand(head: bytes) -> str | None:
    """``avif`` or ``heic``, by the first box of a file; None for other files."""
    if head[4:8] != b"ftyp":
        return None
    major, size = head[8:12], int.from_bytes(head[:4], "big")
    if major in AVIF_BRANDS:
        return "avif"
    if major in HEIF_BRANDS:
        return "heic"
    others = {head[at : at + 4] for at in range(16, min(size, len(head)), 4)}
    if ({major} | others) & _COMMON_BRANDS:
        return "avif" if others & AVIF_BRANDS else "heic"
    return None


def read_heif(data: bytes) -> HeifPicture:
    """Raises UnusableImage, struct.error, IndexError."""
    top, complete = top_boxes(data)
    by_kind = {box.kind: box for box in reversed(top)}
    picture = HeifPicture()
    if (meta := by_kind.get(b"meta")) is not None:
        _read_items(data, meta, picture)
    if data[8:12] == b"avis" and (movie := by_kind.get(b"moov")) is not None:
        _read_tracks(data, movie, picture)
    if not picture.structure.width and complete:
        raise unsupported("a sequence without a still image") if b"moov" in by_kind else corrupt("no image in it")
    if not picture.structure.width:
        picture.structure = Structure(1, 1)
    picture.structure = picture.structure._replace(complete=complete)
    picture.orientation = _ORIENTATIONS[picture._turns, picture._mirror]
    return picture


def _read_items(data: bytes, meta: Box, picture: HeifPicture) -> None:
    """Properties of the primary item."""
    inside = {box.kind: box for box in children(data, meta, 4)}
    first, properties = inside.get(b"pitm"), inside.get(b"iprp")
    if first is None or properties is None:
        return
    primary = struct.unpack_from(">I" if data[first.start] else ">H", data, first.start + 4)[0]
    container = child(data, properties, b"ipco")
    if container is None:
        return
    listed = list(children(data, container))
    for box in children(data, properties):
        if box.kind == b"ipma":
            for number in _associated(data, box, primary):
                if 0 < number <= len(listed):
                    _take(data, listed[number - 1], picture)


def _associated(data: bytes, box: Box, item: int) -> Iterator[int]:
    """Numbers of an item's properties, from 1."""
    version, flags = data[box.start], data[box.start + 3]
    (count,) = struct.unpack_from(">I", data, box.start + 4)
    if count > _MAX_ITEMS:
        raise corrupt(f"{count} items")
    at = box.start + 8
    for _ in range(count):
        (number,) = struct.unpack_from(">H" if version < 1 else ">I", data, at)
        at += 2 if version < 1 else 4
        properties = data[at]
        at += 1
        for _ in range(properties):
            (entry,) = struct.unpack_from(">H" if flags & 1 else ">B", data, at)
            at += 2 if flags & 1 else 1
            if number == item:
                yield entry & (0x7FFF if flags & 1 else 0x7F)


def _take(data: bytes, box: Box, picture: HeifPicture) -> None:
    """One property of the picture."""
    match box.kind:
        case b"ispe":
            width, height = struct.unpack_from(">II", data, box.start + 4)
            picture.structure = Structure(width, height)
        case b"irot":
            picture._turns = data[box.start] & 3
        case b"imir":
            picture._mirror = data[box.start] & 1
        case b"clap":
            picture.cropped = True
        case b"colr" if data[box.start : box.start + 4] == b"nclx":
            picture.cicp = struct.unpack_from(">HH", data, box.start + 4)
        case b"colr":
            picture.profiled = True


def _read_tracks(data: bytes, movie: Box, picture: HeifPicture) -> None:
    """Size, colors and number of frames of a sequence. What only the still item has does not apply to it."""
    still, frames = picture.structure, 0
    picture.orientation, picture._turns, picture._mirror, picture.cropped = 1, 0, None, False
    for track in children(data, movie):
        if track.kind != b"trak":
            continue
        path: Box | None = track
        for kind in (b"mdia", b"minf", b"stbl"):
            path = None if path is None else child(data, path, kind)
        if path is None:
            continue
        sizes, entries = child(data, path, b"stsz"), child(data, path, b"stsd")
        if sizes is not None:
            frames = max(frames, struct.unpack_from(">I", data, sizes.start + 8)[0])
        for entry in [] if entries is None else list(children(data, entries, 8))[:1]:
            width, height = struct.unpack_from(">HH", data, entry.start + 24)
            still = larger(still, Structure(width, height))
            for box in boxes(data, entry.start + _SAMPLE_ENTRY, min(entry.end, len(data))):
                if box.kind == b"colr":
                    _take(data, box, picture)
    picture.structure = still._replace(frames=max(1, frames))
