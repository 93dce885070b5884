"""Boxes of the ISO base media format (ISO/IEC 14496-12), in which AVIF, HEIF, JPEG XL and JPEG 2000 files are kept."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from .structure import corrupt, unsupported

MAX_BOXES = 10_000  # in one box, or at the top of a file


class Box(NamedTuple):
    """``start`` and ``end`` of its contents. ``end`` may be beyond the file, which is then cut."""

    kind: bytes
    start: int
    end: int


def boxes(data: bytes, start: int, end: int) -> Iterator[Box]:
    """The boxes between two places, in order. Raises UnusableImage for an impossible size."""
    for _ in range(MAX_BOXES):
        if start + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        body = start + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, body)
            body += 8
        elif size == 0:  # to the end
            size = end - start
        if size < body - start:
            raise corrupt(f"a box of {size} bytes at byte {start}")
        yield Box(kind, body, start + size)
        start += size
    raise unsupported(f"a file of over {MAX_BOXES} boxes")


def top_boxes(data: bytes) -> tuple[list[Box], bool]:
    """The boxes of a file, and whether it contains the last of them wholly."""
    found = list(boxes(data, 0, len(data)))
    return found, bool(found) and found[-1].end <= len(data) and not data[found[-1].end :].strip(b"\0")


def children(data: bytes, box: Box, skip: int = 0) -> Iterator[Box]:
    """Boxes within a box. ``skip``: bytes of it that come before them; 4 in one with version and flags."""
    return boxes(data, box.start + skip, min(box.end, len(data)))


def child(data: bytes, box: Box, kind: bytes, skip: int = 0) -> Box | None:
    """The first box of a kind within a box."""
    return next((found for found in children(data, box, skip) if found.kind == kind), None)
