"""Colors given by code points become sRGB's, by the same door as those of ICC profiles."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from capipe.manifests.status import Status
from capipe.models.images.cicp import profile_of
from capipe.models.images.decode import EVERYTHING, ImageLimits, decode_upright
from capipe.models.images.formats import ImageProblem, read_header
from capipe.models.images.icc import srgb_conversion

from ...profiles import Floats, from_linear
from .test_decode import Array, encode, scene
from .test_icc import apart

ALL = ImageLimits(accept=EVERYTHING)
# Linear RGB to XYZ under D65, as the standards print them: BT.709, BT.2020 and Display P3.
BT709 = np.array(
    [[0.4123908, 0.3575843, 0.1804808], [0.2126390, 0.7151687, 0.0721923], [0.0193308, 0.1191948, 0.9505322]]
)
BT2020 = np.array([[0.6369580, 0.1446169, 0.1688810], [0.2627002, 0.6779981, 0.0593017], [0.0, 0.0280727, 1.0609851]])
P3 = np.array([[0.4865709, 0.2656677, 0.1982173], [0.2289746, 0.6917385, 0.0792869], [0.0, 0.0451134, 1.0439444]])


def linear(levels: Array) -> Floats:
    scaled = levels / 255
    return np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)


def expected(levels: Array, matrix: Floats) -> Array:
    """sRGB's levels of a picture in other primaries, by the standards' matrices."""
    rgb = linear(levels) @ (np.linalg.inv(BT709) @ matrix).T
    return np.round(from_linear(np.clip(rgb, 0, 1)) * 255).astype(np.uint8)


def converted(levels: Array, primaries: int, transfer: int) -> Array:
    image = Image.fromarray(levels)
    image.info["icc_profile"] = profile_of(primaries, transfer)
    conversion = srgb_conversion(image)
    assert conversion is not None
    return np.asarray(conversion.apply(image))


@pytest.mark.parametrize(("primaries", "matrix"), [(9, BT2020), (12, P3)])
def test_wide_primaries_are_converted(primaries: int, matrix: Floats) -> None:
    picture = scene(96, 64)
    assert apart(converted(picture, primaries, 13), expected(picture, matrix)) <= 1
    assert apart(expected(picture, matrix), picture) > 30  # it matters
    gray = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert apart(converted(gray, primaries, 13), gray) <= 1


def test_other_curves_are_converted() -> None:
    gray = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    for transfer, gamma in ((4, 2.2), (5, 2.8), (8, 1.0)):
        bright = np.round(from_linear((gray / 255) ** gamma) * 255).astype(np.uint8)
        assert apart(converted(gray, 1, transfer)[:, 3:], bright[:, 3:]) <= 2


@pytest.mark.parametrize("transfer", [1, 2, 6, 13, 14, 15, 99])
@pytest.mark.parametrize("primaries", [1, 2, 99])
def test_code_points_of_srgb_and_reserved_ones_need_nothing(primaries: int, transfer: int) -> None:
    assert profile_of(primaries, transfer) is None


def test_profiles_are_sound() -> None:
    for primaries in (4, 5, 6, 7, 8, 9, 10, 11, 12, 22):
        for transfer in (4, 7, 13, 17):
            made = profile_of(primaries, transfer)
            assert made is not None
            opened = ImageCms.ImageCmsProfile(io.BytesIO(made))
            assert opened.profile.xcolor_space == "RGB " and opened.profile.version == 4.4


def with_code_points(data: bytes, primaries: int, transfer: int) -> bytes:
    """An AVIF with other code points in its ``nclx`` box, and none in its codestream's way: the box is what counts."""
    at = data.index(b"nclx") + 4
    return data[:at] + primaries.to_bytes(2, "big") + transfer.to_bytes(2, "big") + data[at + 4 :]


def test_an_avif_with_code_points_alone() -> None:
    picture = scene(96, 64)
    data = encode(picture, "AVIF", quality=100, subsampling="4:4:4")
    plain, wide = (decode_upright(each, ALL) for each in (data, with_code_points(data, 9, 13)))
    assert isinstance(plain, Image.Image) and isinstance(wide, Image.Image)
    assert apart(np.asarray(wide), expected(np.asarray(plain), BT2020)) <= 1


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG"), (9, "logarithmic")])
def test_high_dynamic_range_is_refused(transfer: int, name: str) -> None:
    data = with_code_points(encode(scene(96, 64), "AVIF"), 9, transfer)
    assert read_header(data) == ImageProblem(Status.UNSUPPORTED, f"an AVIF image with a high dynamic range ({name})")


def test_a_heif_image_with_code_points_alone() -> None:
    heif = pytest.importorskip("pillow_heif", reason="the extra 'heif' is not installed")
    heif.register_heif_opener()
    picture, options = scene(96, 64), {"quality": -1, "chroma": 444, "matrix_coefficients": 0, "full_range_flag": 1}
    data = encode(picture, "HEIF", color_primaries=12, transfer_characteristics=13, **options)
    shown = decode_upright(data, ALL)
    assert isinstance(shown, Image.Image)
    assert apart(np.asarray(shown), expected(picture, P3)) <= 2
    data = encode(picture, "HEIF", color_primaries=9, transfer_characteristics=16, **options)
    assert read_header(data) == ImageProblem(Status.UNSUPPORTED, "a HEIF image with a high dynamic range (PQ)")
