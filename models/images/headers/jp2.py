"""JPEG 2000 in its file format: size by header and codestream, and profile (ISO/IEC 15444-1, annexes A and I)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .boxes import children, top_boxes
from .structure import Structure, corrupt, larger

_CODESTREAM = b"\xff\x4f\xff\x51"  # its start, and the marker of its size
_RESTRICTED, _ANY = 2, 3  # methods of a color specification that are ICC profiles


@dataclass(frozen=True, slots=True)
class Jp2:
    """``profile``: ICC, or empty."""

    structure: Structure
    profile: bytes = b""


def read_jp2(data: bytes) -> Jp2:
    """Raises UnusableImage, struct.error, IndexError."""
    found, complete = top_boxes(data)
    size, profile = Structure(0, 0), b""
    for box in found:
        if box.kind == b"jp2h":
            for inner in children(data, box):
                if inner.kind == b"ihdr":
                    height, width = struct.unpack_from(">II", data, inner.start)
                    size = larger(size, Structure(width, height))
                elif inner.kind == b"colr" and data[inner.start] in (_RESTRICTED, _ANY):
                    profile = data[inner.start + 3 : inner.end]
        elif box.kind == b"jp2c" and data[box.start : box.start + 4] == _CODESTREAM:
            right, bottom, left, top = struct.unpack_from(">4I", data, box.start + 8)
            size = larger(size, Structure(max(0, right - left), max(0, bottom - top)))
    if not size.width and complete:
        raise corrupt("a JPEG 2000 file without an image")
    return Jp2((size if size.width else Structure(1, 1))._replace(complete=complete), profile)
