"""BMP and ICO: sizes, and what is left out or unsupported, by their headers (BITMAPINFOHEADER and its successors)."""

from __future__ import annotations

import struct

from .structure import Structure, corrupt, larger, unsupported

_FILE_HEADER = 14
_CORE, _V5 = 12, 124  # bytes of the oldest and the newest header
_HEADERS = (_CORE, 40, 52, 56, 64, 108, _V5)
_UNCOMPRESSED, _RUN_LENGTH = (0, 3), (1, 2)
_EMBEDDED = b"DEBM"  # PROFILE_EMBEDDED, little-endian
_PNG = b"\x89PNG\r\n\x1a\n"


def read_bmp(data: bytes) -> Structure:
    """Raises UnusableImage, struct.error."""
    (pixels,) = struct.unpack_from("<I", data, 10)
    width, height, bits, compression = _dib(data, _FILE_HEADER)
    if compression not in (*_UNCOMPRESSED, *_RUN_LENGTH):
        raise unsupported(f"a BMP with compression {compression}")
    row = (width * bits + 31) // 32 * 4
    complete = compression in _RUN_LENGTH or pixels + row * height <= len(data)
    return Structure(width, height, complete=complete)


def bmp_profile(data: bytes) -> bytes:
    """The ICC profile embedded in a BMP of version 5; empty without one."""
    if struct.unpack_from("<I", data, _FILE_HEADER)[0] != _V5 or data[70:74] != _EMBEDDED:
        return b""
    offset, size = struct.unpack_from("<II", data, _FILE_HEADER + 112)
    return data[_FILE_HEADER + offset : _FILE_HEADER + offset + size]


def read_ico(data: bytes) -> Structure:
    """The largest image of an icon, by what each image says itself. Raises UnusableImage, struct.error."""
    kind, count = struct.unpack_from("<HH", data, 2)
    if kind != 1 or not count:
        raise corrupt("an icon without an image")
    best = Structure(0, 0)
    for number in range(count):
        size, offset = struct.unpack_from("<II", data, 6 + 16 * number + 8)
        if offset + size > len(data):
            return best._replace(complete=False) if best.width else Structure(1, 1, complete=False)
        if data[offset : offset + 8] == _PNG:
            width, height = struct.unpack_from(">II", data, offset + 16)
        else:
            width, height, _, _ = _dib(data, offset)
            height //= 2  # a mask of the same size follows
        best = larger(best, Structure(width, height))
    return best


def _dib(data: bytes, at: int) -> tuple[int, int, int, int]:
    """Width, height, bits per pixel and compression; a negative height (rows from the top) is counted as positive."""
    (size,) = struct.unpack_from("<I", data, at)
    if size == _CORE:
        width, height, _, bits = struct.unpack_from("<4H", data, at + 4)
        return width, height, bits, 0
    if size not in _HEADERS:
        raise unsupported(f"a BMP with a header of {size} bytes")
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, at + 4)
    return width, abs(height), bits, compression
