"""PNGs without the metadata that Pillow would unpack: large profiles and texts are sound, and none of them is a pixel.

Pillow refuses a whole PNG for a profile or a compressed text over a megabyte. Here texts are never unpacked, except for
a small one that may say which way is up.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

from PIL.PngImagePlugin import PngImageFile

from .icc import MAX_PROFILE_BYTES

_SIGNATURE_BYTES = 8
_MAX_ORIENTING_BYTES = 1 << 20  # unpacked, of a text that Pillow is to see
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
    """Whether anything in a PNG could say which way is up."""
    return any(
        kind == b"eXIf" or (kind in _TEXTS and _keyword(memoryview(data)[at + 8 : end - 4]) in _ORIENTING)
        for kind, at, end in _chunks(data)
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of the chunks before the last."""
    at = _SIGNATURE_BYTES
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if kind == b"IEND" or end > len(data):
            return
        yield kind, at, end
        at = end


def _keyword(body: memoryview) -> bytes:
    """What a text is called; keywords have at most 79 bytes."""
    return bytes(body[:80]).partition(b"\0")[0]


def _unpacked_profile(body: bytes) -> bytes | None:
    """The profile of an ``iCCP`` chunk, None for one that is broken or larger than any picture's profile is."""
    _, _, packed = body.partition(b"\0")
    return _unpacked(packed[1:], MAX_PROFILE_BYTES) if packed[:1] == b"\0" else None


def _is_small(kind: bytes, body: bytes) -> bool:
    """Whether a text can be read, and stays under the limit when it is unpacked."""
    _, _, text = body.partition(b"\0")
    if kind == b"zTXt":
        return text[:1] == b"\0" and _unpacked(text[1:], _MAX_ORIENTING_BYTES) is not None
    if kind == b"iTXt" and text[:1] == b"\1":
        packed = text[2:].split(b"\0", 2)[-1]
        return text[1:2] == b"\0" and _unpacked(packed, _MAX_ORIENTING_BYTES) is not None
    return len(text) <= _MAX_ORIENTING_BYTES


def _unpacked(packed: bytes, limit: int) -> bytes | None:
    """At most ``limit`` bytes; None where there are more, or where ``packed`` is damaged."""
    inflate = zlib.decompressobj()
    try:
        out = inflate.decompress(packed, limit + 1)
    except zlib.error:
        return None
    return out if len(out) <= limit and inflate.eof else None
