"""Other formats become the PNG of what they show; what cannot be has a reason."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image, features

from capipe.manifests.status import Status
from capipe.models.images.convert import Converted, to_png
from capipe.models.images.decode import ImageInfo, ImageLimits, check
from capipe.models.images.formats import ImageProblem

from ...profiles import PERMUTED, SRGB_CURVE, muted, rgb_profile, stored
from .test_decode import encode, scene
from .test_icc import apart

LIMITS = ImageLimits()
PICTURE = scene(96, 64)
FORMATS = [("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tiff"), ("ICO", "ico"), ("JPEG2000", "jp2")]
FORMATS += [("AVIF", "avif")] if features.check("avif") else []


def shown(data: bytes) -> Image.Image:
    """The PNG that ``data`` became, as it is without any metadata heeded."""
    found = to_png(data, LIMITS)
    assert isinstance(found, Converted), found
    assert isinstance(check(found.data, LIMITS), ImageInfo)
    image = Image.open(io.BytesIO(found.data))
    assert (image.format, image.mode) == ("PNG", "RGB") and "icc_profile" not in image.info and not image.getexif()
    return image


def refused(data: bytes, limits: ImageLimits = LIMITS) -> ImageProblem:
    found = to_png(data, limits)
    assert isinstance(found, ImageProblem), found
    return found


@pytest.mark.parametrize(("fmt", "name"), FORMATS)
def test_a_still_picture_becomes_a_png(fmt: str, name: str) -> None:
    image = Image.fromarray(PICTURE)
    image = image.quantize(200) if fmt == "GIF" else image
    more = {"ICO": {"sizes": [(96, 64)]}, "AVIF": {"quality": 95}}.get(fmt, {})
    data = encode(image, fmt, **more)
    found = to_png(data, LIMITS)
    assert isinstance(found, Converted) and found.format == name
    seen = np.asarray(shown(data)).astype(int)
    expected = np.asarray(image.convert("RGB"))
    assert np.abs(seen - expected).mean() < 3 and (fmt == "AVIF" or (seen == expected).all())
    assert to_png(data, LIMITS) == found  # the same bytes each time


@pytest.mark.parametrize("fmt", [fmt for fmt, _ in FORMATS if fmt in ("TIFF", "AVIF")])
def test_it_is_upright_and_in_srgb(fmt: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = shown(encode(PICTURE, fmt, exif=exif))
    turned = np.asarray(Image.fromarray(PICTURE).transpose(Image.Transpose.ROTATE_270))
    assert seen.size == (64, 96) and np.abs(np.asarray(seen).astype(int) - turned).mean() < 3
    picture = muted(PICTURE)
    data = encode(stored(picture, PERMUTED, SRGB_CURVE), fmt, icc_profile=rgb_profile(PERMUTED, SRGB_CURVE), quality=95)
    assert np.abs(np.asarray(shown(data)).astype(int) - picture).mean() < 3


def test_kinds_of_pixels() -> None:
    deep = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for data in (encode(Image.fromarray(deep), "TIFF"), encode(Image.fromarray(deep), "JPEG2000")):
        assert apart(np.asarray(shown(data))[..., 0], np.round(deep / 257).astype(np.uint8)) <= 1
    clear = np.concatenate([PICTURE, np.zeros((64, 96, 1), np.uint8)], axis=-1)
    assert (np.asarray(shown(encode(clear, "TIFF"))) == 255).all()
    for mode in ("CMYK", "1", "L", "P"):
        image = Image.fromarray(PICTURE).convert(mode)
        assert apart(np.asarray(shown(encode(image, "TIFF"))), np.asarray(image.convert("RGB"))) == 0
    for unclear in (Image.new("F", (64, 64)), Image.new("I", (64, 64)), Image.new("LAB", (64, 64))):
        found = refused(encode(unclear, "TIFF"))
        assert found.status is Status.UNSUPPORTED and f"mode {unclear.mode}" in found.reason


def test_what_is_no_still_picture_stays_unsupported() -> None:
    second = [Image.fromarray(scene(96, 64, 2))]
    reasons = {"GIF": "animated image (2 frames)", "TIFF": "a TIFF image of 2 pages"}
    for fmt, reason in reasons.items():
        data = encode(PICTURE, fmt, save_all=True, append_images=second)
        assert refused(data) == ImageProblem(Status.UNSUPPORTED, reason)
    for data in (b"%PDF-1.7 ...", b"<svg/>", b"", b"plain text", encode(PICTURE), encode(PICTURE, "PNG")):
        assert to_png(data, LIMITS) is None


def test_limits_and_damage() -> None:
    large = encode(PICTURE, "BMP")
    assert refused(large, ImageLimits(max_image_pixels=96 * 64 - 1)).status is Status.TOO_LARGE
    assert refused(large, ImageLimits(min_side=65)).status is Status.TOO_SMALL
    bomb = large[:18] + (60_000).to_bytes(4, "little") * 2 + large[26:]
    assert refused(bomb).status is Status.TOO_LARGE and "3600 megapixels" in refused(bomb).reason
    rng = np.random.default_rng(0)
    for fmt, _ in FORMATS:
        data = encode(PICTURE, fmt)
        for share in (0.02, 0.3, 0.9):
            assert refused(data[: max(12, int(len(data) * share))]).status is Status.CORRUPT
        for _ in range(30):
            broken = bytearray(data)
            for at in rng.integers(12, len(data), 3):
                broken[at] = int(rng.integers(256))
            assert isinstance(to_png(bytes(broken), LIMITS), Converted | ImageProblem)


def test_heif_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not there
    found = refused(b"\0\0\0\x1cftypheic" + bytes(40))
    assert found.status is Status.UNSUPPORTED and "install the package pillow_heif" in found.reason


def test_heif_with_it() -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(PICTURE, "HEIF", quality=95, exif=exif.tobytes())
    found = to_png(data, LIMITS)
    assert isinstance(found, Converted) and found.format == "heif"
    turned = np.asarray(Image.fromarray(PICTURE).transpose(Image.Transpose.ROTATE_270))
    assert np.abs(np.asarray(shown(data)).astype(int) - turned).mean() < 6
