"""Pictures under ICC profiles: seen as their sRGB twins; sRGB's own profiles change nothing and cost no transform."""

from __future__ import annotations

import io
import itertools
import threading

import numpy as np
import pytest
from PIL import Image, ImageCms

from capipe.models.images import icc
from capipe.models.images.decode import ImageInfo, ImageLimits, check, decode_rgb, decode_upright, thumbnail
from capipe.models.images.grid import ImageGrid
from capipe.models.images.icc import srgb_conversion
from capipe.models.images.preprocess import Preprocess, decode_preprocessed

from ...profiles import (
    PERMUTED,
    PROPHOTO,
    SRGB,
    SRGB_CURVE,
    Floats,
    Levels,
    cmyk_profile,
    from_linear,
    gray_profile,
    muted,
    patches,
    rgb_profile,
    stored,
)
from .test_decode import encode, scene

LIMITS = ImageLimits()
GRID = ImageGrid(factor=4, min_pixels=16, max_pixels=10**7)
FORMATS = (("PNG", {}), ("JPEG", {"quality": 95, "subsampling": 0}), ("WEBP", {"lossless": True}))
PROFILES = (("permuted", PERMUTED, SRGB_CURVE), ("prophoto", PROPHOTO, 1.8), ("gamma", SRGB, 1.0))
WHITE, RED, BLUE = (255, 255, 255), (200, 60, 40), (60, 80, 200)


def seen(data: bytes) -> Levels:
    image = decode_upright(data, LIMITS)
    assert isinstance(image, Image.Image), image
    assert image.mode == "RGB"
    return np.asarray(image)


def apart(a: Levels, b: Levels) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(("fmt", "options"), FORMATS)
@pytest.mark.parametrize(("name", "primaries", "gamma"), PROFILES)
def test_a_picture_is_seen_as_its_srgb_twin(
    fmt: str, options: dict[str, object], name: str, primaries: Floats, gamma: float
) -> None:
    picture = muted(scene(96, 64))
    under = stored(picture, primaries, gamma)
    assert apart(under, picture) > 40  # or there would be nothing to test
    data = encode(under, fmt, icc_profile=rgb_profile(primaries, gamma), **options)
    assert apart(seen(data), picture) <= 16
    model = decode_rgb(data, GRID, LIMITS)
    assert isinstance(model, np.ndarray) and apart(model, picture) <= 16
    small = thumbnail(data, LIMITS, 32)
    twin = thumbnail(encode(picture, fmt, **options), LIMITS, 32)
    assert apart(np.asarray(small.image), np.asarray(twin.image)) <= 16
    views = decode_preprocessed(data, preprocesses=(Preprocess(64, 64),), limits=LIMITS)
    twins = decode_preprocessed(encode(picture, fmt, **options), preprocesses=(Preprocess(64, 64),), limits=LIMITS)
    assert apart(views[0], twins[0]) <= 16


@pytest.mark.parametrize(("fmt", "options"), FORMATS)
def test_the_hash_is_the_twins(fmt: str, options: dict[str, object]) -> None:
    picture = muted(np.stack([scene(256, 192, seed)[..., 0] for seed in range(3)], axis=-1))
    twin = check(encode(picture, fmt, **options), LIMITS)
    under = encode(stored(picture, PERMUTED, SRGB_CURVE), fmt, **options)
    data = encode(stored(picture, PERMUTED, SRGB_CURVE), fmt, icc_profile=rgb_profile(PERMUTED, SRGB_CURVE), **options)
    hashes = [int(each.phash, 16) for each in (twin, check(under, LIMITS), check(data, LIMITS))]
    assert (hashes[0] ^ hashes[1]).bit_count() > 12  # the same picture without its profile
    assert (hashes[0] ^ hashes[2]).bit_count() <= 4


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        rgb_profile(SRGB, SRGB_CURVE),
        rgb_profile(SRGB, SRGB_CURVE, padding=100_000),
        b"",
        b"not a profile at all",
        rgb_profile()[:300],
        rgb_profile(np.zeros((3, 3))),  # by which every color is black
        cmyk_profile(),  # of another kind than the picture
        gray_profile(),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    ],
    ids=["pillow", "made", "padded", "empty", "text", "cut", "black", "cmyk", "gray", "lab"],
)
def test_profiles_of_srgb_and_useless_ones_change_no_pixel(profile: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = scene(96, 64)
    data, plain = (encode(picture, quality=95, **more) for more in ({"icc_profile": profile}, {}))
    assert srgb_conversion(opened(data)) is None
    monkeypatch.setattr(icc.Conversion, "apply", None)  # from here on a transform would fail
    assert apart(seen(data), seen(plain)) == 0
    assert check(data, LIMITS) == check(plain, LIMITS)
    assert (decode_rgb(data, GRID, LIMITS) == decode_rgb(plain, GRID, LIMITS)).all()


def test_a_damaged_profile_never_raises() -> None:
    rng, whole = np.random.default_rng(0), rgb_profile()
    for _ in range(100):
        broken = bytearray(whole)
        for at in rng.integers(0, len(broken), 4):
            broken[at] = int(rng.integers(256))
        assert isinstance(check(encode(scene(32, 32), icc_profile=bytes(broken)), LIMITS), ImageInfo)


def test_cmyk_by_its_profile() -> None:
    inks = np.array([[[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    image = Image.fromarray(inks.repeat(32, axis=0).repeat(32, axis=1), "CMYK")
    found = seen(encode(image, quality=95, icc_profile=cmyk_profile()))[16, 16::32]
    assert apart(found, np.array([[255, 255, 0], [0, 255, 255], [255, 0, 255], [255, 255, 255], [0, 0, 0]])) <= 8
    plain = seen(encode(image, quality=95))[16, 16::32]  # as before
    assert apart(plain, np.array([[0, 255, 255], [255, 0, 255], [255, 255, 0], [255, 255, 255], [0, 0, 0]])) <= 8


def test_gray_by_its_profile() -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(32, axis=0)
    twin = np.round(255 * from_linear(ramp / 255))
    for image in (
        Image.fromarray(ramp),
        Image.fromarray(ramp.astype(np.uint16) * 257),
        Image.merge("LA", [Image.fromarray(ramp), Image.new("L", (64, 32), 255)]),
    ):
        for profile in (gray_profile(1.0), rgb_profile(SRGB, 1.0)):
            found = seen(encode(image, "PNG", icc_profile=profile))
            assert apart(found, twin[..., None]) <= 2
    assert apart(seen(encode(Image.fromarray(ramp), "PNG", icc_profile=gray_profile(SRGB_CURVE))), ramp[..., None]) == 0


def test_transparency_is_laid_on_white_after_the_conversion() -> None:
    opaque = stored(np.asarray(patches(RED, BLUE)), PERMUTED, SRGB_CURVE)
    alpha = np.full((*opaque.shape[:2], 1), 255, np.uint8)
    alpha[:, 32:] = 0
    profile = rgb_profile(PERMUTED, SRGB_CURVE)
    for fmt in ("PNG", "WEBP"):
        image = Image.fromarray(np.concatenate([opaque, alpha], axis=-1))
        assert apart(seen(encode(image, fmt, lossless=True, icc_profile=profile)), np.asarray(patches(RED, WHITE))) <= 2
    palette = Image.fromarray(opaque).quantize(4)
    data = encode(palette, "PNG", transparency=palette.getpixel((40, 0)), icc_profile=profile)
    assert apart(seen(data), np.asarray(patches(RED, WHITE))) <= 2
    assert apart(seen(encode(palette, "PNG", icc_profile=profile)), np.asarray(patches(RED, BLUE))) <= 2


def test_turned_and_converted() -> None:
    picture = np.asarray(patches(RED, BLUE))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(stored(picture, PERMUTED, SRGB_CURVE)).transpose(Image.Transpose.ROTATE_90)
    for fmt, options in FORMATS:
        data = encode(lying, fmt, exif=exif, icc_profile=rgb_profile(PERMUTED, SRGB_CURVE), **options)
        assert apart(seen(data)[8:24, 8:24], picture[8:24, 8:24]) <= 4
        info = check(data, LIMITS)
        assert isinstance(info, ImageInfo) and (info.width, info.height) == (64, 32)


def test_a_profile_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[str]()
    transform = icc._transform
    monkeypatch.setattr(icc, "_transform", lambda source, mode: made.append(mode) or transform(source, mode))
    monkeypatch.setattr(icc, "_conversions", icc.LRUCache(3))
    pictures = [opened(encode(scene(32, 32), icc_profile=rgb_profile(PROPHOTO, gamma))) for gamma in (1.1, 1.2, 1.3)]
    plain = opened(encode(scene(32, 32), icc_profile=rgb_profile(SRGB, SRGB_CURVE)))
    threads = [threading.Thread(target=srgb_conversion, args=(each,)) for each in [*pictures, plain] for _ in range(8)]
    monkeypatch.setattr(icc, "_conversions", icc.LRUCache(4))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["RGB"] * 4
    monkeypatch.setattr(icc, "_conversions", icc.LRUCache(2))
    for image in itertools.islice(itertools.cycle(pictures), 6):
        srgb_conversion(image)
    assert len(made) == 10  # of three in turn, two are kept: the oldest goes


def test_threads_share_a_conversion() -> None:
    picture = muted(scene(640, 480))
    image = Image.fromarray(stored(picture, PERMUTED, SRGB_CURVE))
    image.info["icc_profile"] = rgb_profile(PERMUTED, SRGB_CURVE)
    found = list[int]()

    def convert() -> None:
        for _ in range(10):
            found.append(apart(np.asarray(srgb_conversion(image).apply(image)), picture))

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40 and max(found) <= 2
