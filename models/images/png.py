"""Opening PNGs without the metadata that Pillow would decompress: large profiles and texts are valid, but no pixels.

Pillow refuses a whole PNG for a profile or a compressed text over a megabyte. Here texts are never decompressed, except
for a small one that may hold the orientation.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

from PIL.PngImagePlugin import PngImageFile

from .icc import MAX_PROFILE_BYTES

_SIGNATURE_BYTES = 8
_MAX_ORIENTING_BYTES = 1 << 20  # decompressed, of a text that Pillow may read
_ORIENTING = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # texts in which Pillow looks for the orientation
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


def open_png(data: bytes) -> PngImageFile:
    """``data``, which has all its chunks, opened but not yet decoded; its profile is in ``info["icc_profile"]``.

    Raises what Pillow does.
    """
    profile: bytes | None = None
    orienting = set[bytes]()
    kept, start = list[memoryview](), 0
    for kind, at, end in _chunks(data):
        if kind != b"iCCP" and kind not in _TEXTS:
            continue
        body = memoryview(data)[at + 8 : end - 4]
        if kind == b"iCCP":
            profile = profile or _unpacked_profile(bytes(body))
        elif (keyword := _keyword(body)) in _ORIENTING and keyword not in orienting and _is_small(kind, bytes(body)):
            orienting.add(keyword)
            continue
        kept.append(memoryview(data)[start:at])
        start = end
    image = PngImageFile(io.BytesIO(b"".join([*kept, memoryview(data)[start:]]) if kept else data))
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


def may_be_turned(data: bytes) -> bool:
    """Whether a PNG has metadata that could rotate it."""
    return any(
        kind == b"eXIf" or (kind in _TEXTS and _keyword(memoryview(data)[at + 8 : end - 4]) in _ORIENTING)
        for kind, at, end in _chunks(data)
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of all chunks before the last."""
    at = _SIGNATURE_BYTES
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if kind == b"IEND" or end > len(data):
            return
        yield kind, at, end
        at = end


def _keyword(body: memoryview) -> bytes:
    """The keyword of a text chunk, at most 79 bytes."""
    return bytes(body[:80]).partition(b"\0")[0]


def _unpacked_profile(body: bytes) -> bytes | None:
    """The profile of an ``iCCP`` chunk, None for one that is broken or too large."""
    _, _, packed = body.partition(b"\0")
    return _unpacked(packed[1:], MAX_PROFILE_BYTES) if packed[:1] == b"\0" else None


def _is_small(kind: bytes, body: bytes) -> bool:
    """Whether a text can be read, and stays under the limit when decompressed."""
    _, _, text = body.partition(b"\0")
    if kind == b"zTXt":
        return text[:1] == b"\0" and _unpacked(text[1:], _MAX_ORIENTING_BYTES) is not None
    if kind == b"iTXt" and text[:1] == b"\1":
        packed = text[2:].split(b"\0", 2)[-1]
        return text[1:2] == b"\0" and _unpacked(packed, _MAX_ORIENTING_BYTES) is not None
    return len(text) <= _MAX_ORIENTING_BYTES


def _unpacked(packed: bytes, limit: int) -> bytes | None:
    """Decompress at most ``limit`` bytes; None where there are more, or where ``packed`` is damaged."""
    inflate = zlib.decompressobj()
    try:
        out = inflate.decompress(packed, limit + 1)
    except zlib.error:
        return None
    return out if len(out) <= limit and inflate.eof else None
