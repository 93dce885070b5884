"""What a server is sent: a picture's own bytes where any reader shows them right, or else the picture as shown here."""

from __future__ import annotations

import base64
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from capipe.models.engines.base import ChoiceRequest, GenerationRequest, ImageInput, Prompt
from capipe.models.images.decode import ImageLimits, decode_upright, is_plain, plain_copy

from ...profiles import PERMUTED, SRGB, SRGB_CURVE, cmyk_profile, rgb_profile, stored
from ..chat_server import Double, ask, completion
from ..images.test_decode import cmyk, encode, png_chunk, scene
from ..images.test_icc import apart
from ..images.test_png import PLAIN, international, with_chunk, xmp

LIMITS = ImageLimits()
PICTURE = scene(96, 64)
FADED = np.concatenate([PICTURE, np.full((64, 96, 1), 100, np.uint8)], axis=-1)
PALETTE = Image.fromarray(PICTURE).quantize(16)
DEEP = np.arange(96 * 64, dtype=np.uint16).reshape(64, 96) * 10


def turned(fmt: str, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(PICTURE, fmt, exif=exif)


def sixteen_bit_rgb() -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""
    eight = encode(np.full((32, 32, 3), 77, np.uint8), "PNG")
    header = eight[16:24] + bytes([16]) + eight[25:29]
    row = b"\0" + b"\x4d\x4d" * 96
    return b"".join(
        [eight[:8], png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(row * 32)), png_chunk(b"IEND", b"")]
    )


ODD = {
    "turned JPEG": turned("JPEG"),
    "turned PNG": turned("PNG"),
    "turned WebP": turned("WEBP"),
    "mirrored JPEG": turned("JPEG", 2),
    "turned by XMP": with_chunk(PLAIN, b"iTXt", international(b"XML:com.adobe.xmp", xmp(6))),
    "16-bit gray": encode(Image.fromarray(DEEP), "PNG"),
    "16-bit RGB": sixteen_bit_rgb(),
    "transparent PNG": encode(FADED, "PNG"),
    "transparent WebP": encode(FADED, "WEBP"),
    "gray with transparency": encode(Image.fromarray(FADED).convert("LA"), "PNG"),
    "palette with transparency": encode(PALETTE, "PNG", transparency=3),
    "CMYK": encode(Image.fromarray(cmyk(PICTURE), "CMYK")),
    "CMYK with a profile": encode(Image.fromarray(cmyk(PICTURE), "CMYK"), icc_profile=cmyk_profile()),
    "profile": encode(stored(PICTURE, PERMUTED, SRGB_CURVE), icc_profile=rgb_profile(PERMUTED, SRGB_CURVE)),
}
AS_THEY_ARE = {
    "JPEG": encode(PICTURE),
    "upright by EXIF": turned("JPEG", 1),
    "gray": encode(PICTURE[..., 0]),
    "PNG": encode(PICTURE, "PNG"),
    "palette": encode(PALETTE, "PNG"),
    "bilevel": encode(Image.fromarray(PICTURE).convert("1"), "PNG"),
    "PNG that is upright by XMP": with_chunk(PLAIN, b"iTXt", international(b"XML:com.adobe.xmp", xmp(1))),
    "WebP": encode(PICTURE, "WEBP"),
    "sRGB": encode(PICTURE, icc_profile=rgb_profile(SRGB, SRGB_CURVE)),
    "a broken profile": encode(PICTURE, icc_profile=rgb_profile()[:200]),
    "undecodable": encode(PICTURE)[:300],
}


async def sent(encoded: bytes, *, choices: bool = False) -> tuple[str, bytes]:
    """Media type and bytes of the image that a server got."""
    top = [{"token": "A", "logprob": -0.5, "top_logprobs": [{"token": "A", "logprob": -0.5}]}]
    double = Double(lambda n, body: completion("A", logprobs={"content": top}))
    prompt = Prompt("Describe.", ImageInput("u", encoded=encoded))
    await ask(double, ChoiceRequest(prompt, ("A", "B")) if choices else GenerationRequest(prompt))
    head, _, data = double.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(data)


@pytest.mark.parametrize("name", ODD)
async def test_a_server_gets_the_picture_that_engines_here_see(name: str) -> None:
    media_type, data = await sent(ODD[name])
    assert media_type == "image/png"
    bare = Image.open(io.BytesIO(data))  # as by a server that looks at pixels only
    assert bare.mode == "RGB" and not bare.getexif() and "icc_profile" not in bare.info and data[24] == 8
    seen = decode_upright(ODD[name], LIMITS)
    assert isinstance(seen, Image.Image)
    assert bare.size == seen.size and apart(np.asarray(bare), np.asarray(seen)) == 0
    assert await sent(data) == ("image/png", data)
    assert await sent(ODD[name], choices=True) == (media_type, data)


@pytest.mark.parametrize("name", AS_THEY_ARE)
async def test_other_pictures_are_sent_byte_for_byte(name: str) -> None:
    assert (await sent(AS_THEY_ARE[name]))[1] == AS_THEY_ARE[name]


def test_a_large_picture_is_no_png_of_many_megabytes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    photo = scene(2400, 1800)
    data = encode(photo, quality=90, exif=exif)
    copy = plain_copy(data, LIMITS)
    assert isinstance(copy, bytes) and len(copy) < 3 * len(data) and is_plain(copy)
    seen = decode_upright(data, LIMITS)
    bare = Image.open(io.BytesIO(copy))
    assert isinstance(seen, Image.Image) and bare.size == seen.size == (1800, 2400)
    assert np.abs(np.asarray(bare).astype(int) - np.asarray(seen)).mean() < 1
