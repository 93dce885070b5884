"""GIF: canvas, first frame, number of frames, profile (GIF89a specification; ICC.1, annex B)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .structure import MAX_FRAMES, Structure, corrupt, unsupported

MAX_BLOCKS = 4_000_000  # of data: a gigabyte in blocks of the usual 255 bytes
_EXTENSION, _IMAGE, _TRAILER = 0x21, 0x2C, 0x3B
_APPLICATION = 0xFF
_PROFILE = b"ICCRGBG1012"


@dataclass(frozen=True, slots=True)
class Gif:
    """``box``: (left, top, right, bottom) of the first frame on the canvas; ``profile``: ICC, or empty."""

    structure: Structure
    box: tuple[int, int, int, int]
    profile: bytes


def read_gif(data: bytes) -> Gif:
    """Walk through the blocks; no pixel is decoded. Raises UnusableImage, struct.error, IndexError.

    The canvas is as large as the first frame needs: decoders enlarge it so.
    """
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + _palette_bytes(flags)
    frames, blocks, complete, box, profile = 0, 0, False, None, b""
    while at < len(data):
        kind = data[at]
        if kind == _TRAILER:
            complete = True
            break
        if kind == _EXTENSION:
            start = at + 2
        elif kind == _IMAGE:
            left, top, across, down, local = struct.unpack_from("<4HB", data, at + 1)
            frames += 1
            if frames > MAX_FRAMES:
                raise unsupported(f"a GIF of over {MAX_FRAMES} frames")
            box = box or (left, top, left + across, top + down)
            start = at + 11 + _palette_bytes(local)
        elif kind == 0:  # padding that some writers leave
            at += 1
            continue
        else:
            raise corrupt(f"no GIF block at byte {at}")
        end, count = _skip_blocks(data, start)
        blocks += count
        if blocks > MAX_BLOCKS:
            raise unsupported(f"a GIF of over {MAX_BLOCKS} blocks of data")
        if kind == _EXTENSION and data[at + 1] == _APPLICATION and data[at + 3 : at + 14] == _PROFILE:
            profile = _joined(data, at + 14, end)
        at = end
    if box is None:
        if complete:
            raise corrupt("a GIF without an image")
        box = (0, 0, width, height)
    return Gif(Structure(max(width, box[2]), max(height, box[3]), max(1, frames), complete), box, profile)


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_blocks(data: bytes, at: int) -> tuple[int, int]:
    """End of a run of data blocks, beyond the file where it is cut; and their number."""
    count = 0
    while at < len(data):
        length = data[at]
        at += 1 + length
        count += 1
        if not length:
            return at, count
        if count > MAX_BLOCKS:
            return at, count
    return len(data) + 1, count


def _joined(data: bytes, at: int, end: int) -> bytes:
    parts = []
    while at < end - 1:
        parts.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    return b"".join(parts)
