"""PNGs with much metadata: sound, whatever it is and however large; what it unpacks to costs no memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from capipe.models.images.decode import ImageInfo, ImageLimits, check, decode_upright
from capipe.models.images.png import open_png

from ...profiles import PERMUTED, SRGB_CURVE, patches, rgb_profile, stored
from .test_decode import encode, png_chunk, scene

LIMITS = ImageLimits()
MEGABYTE = 1 << 20
WORKFLOW = '{"nodes": "' + "x" * 3 * MEGABYTE + '"}'


def with_chunk(data: bytes, kind: bytes, body: bytes, *, last: bool = False) -> bytes:
    """``data`` with one more chunk: behind its header or before its end."""
    at = len(data) - 12 if last else 33
    return data[:at] + png_chunk(kind, body) + data[at:]


def texts(**values: str) -> bytes:
    info = PngInfo()
    for name, value in values.items():
        info.add_text(name, value, zip=True)
    return encode(scene(64, 48), "PNG", pnginfo=info)


def international(keyword: bytes, text: bytes) -> bytes:
    return keyword + b"\0\1\0\0\0" + zlib.compress(text)


def xmp(orientation: int, padding: int = 0) -> bytes:
    return b'<x:xmpmeta tiff:Orientation="%d"/>' % orientation + b" " * padding


PLAIN = encode(scene(64, 48), "PNG")
METADATA = {
    "icc": encode(scene(64, 48), "PNG", icc_profile=rgb_profile(PERMUTED, SRGB_CURVE, 2 * MEGABYTE)),
    "zTXt": texts(workflow=WORKFLOW),
    "iTXt": with_chunk(PLAIN, b"iTXt", international(b"workflow", WORKFLOW.encode())),
    "XMP": with_chunk(PLAIN, b"iTXt", international(b"XML:com.adobe.xmp", xmp(1, 2 * MEGABYTE))),
    "at the end": with_chunk(PLAIN, b"zTXt", b"prompt\0\0" + zlib.compress(WORKFLOW.encode()), last=True),
    "many": texts(**{f"part{number}": WORKFLOW[:MEGABYTE] for number in range(70)}),
    "unknown compression": with_chunk(PLAIN, b"zTXt", b"prompt\0\7abc"),
    "unknown compression of a profile": with_chunk(PLAIN, b"iCCP", b"name\0\7abc"),
    "damaged": with_chunk(PLAIN, b"iCCP", b"name\0\0abc"),
    "empty": with_chunk(with_chunk(PLAIN, b"iCCP", b""), b"iTXt", b""),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_makes_no_png_corrupt(name: str) -> None:
    found = check(METADATA[name], LIMITS)
    assert isinstance(found, ImageInfo), found
    assert (found.format, found.width, found.height) == ("png", 64, 48)
    image = decode_upright(METADATA[name], LIMITS)
    assert isinstance(image, Image.Image)
    if name != "icc":
        assert (np.asarray(image) == scene(64, 48)).all() and found == check(PLAIN, LIMITS)


def test_a_large_profile_is_heeded() -> None:
    picture = np.asarray(patches((200, 60, 40), (60, 80, 200)))
    profile = rgb_profile(PERMUTED, SRGB_CURVE, 2 * MEGABYTE)
    data = encode(stored(picture, PERMUTED, SRGB_CURVE), "PNG", icc_profile=profile)
    assert open_png(data).info["icc_profile"] == profile
    assert np.abs(np.asarray(decode_upright(data, LIMITS)).astype(int) - picture).max() <= 2


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_what_unpacks_to_gigabytes_costs_no_memory(kind: bytes) -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(16 * MEGABYTE)) for _ in range(32)) + packer.flush()  # 512 MB
    head = {b"iCCP": b"name\0\0", b"zTXt": b"Raw profile type exif\0\0", b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0"}
    data = with_chunk(PLAIN, kind, head[kind] + bomb)
    tracemalloc.start()
    try:
        found = check(data, LIMITS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == check(PLAIN, LIMITS)
    assert peak < 64 * MEGABYTE


def test_small_texts_still_say_which_way_is_up() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    profile = f"\nexif\n{len(raw):8}\n{raw.hex()}\n"
    packed = with_chunk(PLAIN, b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile.encode()))
    for data in (
        packed,
        with_chunk(packed, b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"x" * 2 * MEGABYTE)),
        with_chunk(PLAIN, b"tEXt", b"Raw profile type exif\0" + profile.encode()),
        with_chunk(PLAIN, b"iTXt", international(b"XML:com.adobe.xmp", xmp(6))),
        with_chunk(PLAIN, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)),
    ):
        found = check(data, LIMITS)
        assert isinstance(found, ImageInfo) and (found.width, found.height) == (48, 64)


def test_a_png_without_metadata_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[bytes]()
    monkeypatch.setattr(io, "BytesIO", lambda data, make=io.BytesIO: opened.append(data) or make(data))
    open_png(PLAIN)
    assert opened[0] is PLAIN


def test_a_chunk_that_ends_outside_of_the_file() -> None:
    cut = PLAIN[:33] + struct.pack(">I", 1 << 30) + b"zTXtabc"
    with pytest.raises((OSError, SyntaxError)):
        open_png(cut)
