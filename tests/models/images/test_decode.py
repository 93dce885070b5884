"""Encoded bytes in, a verdict or pixels out: every kind of file a crawl brings."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, PngImagePlugin

from capipe.manifests.status import Status
from capipe.models.images.decode import ImageInfo, ImageLimits, check, decode_rgb, grid_size
from capipe.models.images.formats import ImageProblem, read_header, sniff
from capipe.models.images.grid import ImageGrid

LIMITS = ImageLimits()
WIDE_GRID = ImageGrid(factor=4, min_pixels=16, max_pixels=10**7)  # large enough to leave most sizes alone
Array = npt.NDArray[np.uint8]


def scene(width: int, height: int, seed: int = 0) -> Array:
    """Smooth noise: compresses and scales like a photograph. ``(height, width, 3)``."""
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Array | Image.Image, fmt: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, fmt, **options)
    return out.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def info(data: bytes, limits: ImageLimits = LIMITS) -> ImageInfo:
    found = check(data, limits)
    assert isinstance(found, ImageInfo), found
    return found


def problem(data: bytes, limits: ImageLimits = LIMITS) -> ImageProblem:
    """The problem with ``data``, which checking and decoding must agree on."""
    found = check(data, limits)
    assert isinstance(found, ImageProblem), found
    assert decode_rgb(data, WIDE_GRID, limits) == found
    return found


def pixels(data: bytes, grid: ImageGrid = WIDE_GRID, *, dct_scaling: bool = True) -> Array:
    found = decode_rgb(data, grid, LIMITS, dct_scaling=dct_scaling)
    assert isinstance(found, np.ndarray), found
    return found


def difference(a: Array, b: Array) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize(
    ("fmt", "options", "name"),
    [
        ("JPEG", {}, "jpg"),
        ("JPEG", {"progressive": True}, "jpg"),
        ("JPEG", {"keep_rgb": True}, "jpg"),
        ("PNG", {}, "png"),
        ("WEBP", {"quality": 90}, "webp"),
        ("WEBP", {"lossless": True}, "webp"),
    ],
)
def test_sound_images(fmt: str, options: dict[str, object], name: str) -> None:
    data = encode(scene(120, 80), fmt, **options)
    found = info(data)
    assert (found.format, found.width, found.height) == (name, 120, 80)
    assert difference(pixels(data), scene(120, 80)) < 5


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf  <HTML><head>", "an HTML page"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b'<?xml version="1.0"?><rss/>', "an XML file"),
        (encode(scene(32, 32), "GIF"), "a GIF image"),
        (encode(scene(32, 32), "BMP"), "a BMP image"),
        (encode(scene(32, 32), "TIFF"), "a TIFF image"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "a HEIF image"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "an AVIF image"),
        (b'{"error": "not found"}', "JSON text"),
        ("fünf Zeichen".encode(), "plain text"),
        (("x" * 4095 + "ü").encode(), "plain text"),  # the head ends inside a character
        (b"\x93\x00\x01\x02 binary", "unknown data (starts with 93 00 01 02"),
    ],
)
def test_other_formats_are_named(data: bytes, what: str) -> None:
    found = problem(data)
    assert found.status is Status.UNSUPPORTED
    assert what in found.reason


def test_empty_and_blank_files_are_corrupt() -> None:
    assert problem(b"") == ImageProblem(Status.CORRUPT, "zero bytes")
    assert problem(bytes(5000)).status is Status.CORRUPT
    assert problem(b"\xff\xd8").status is Status.CORRUPT


@pytest.mark.parametrize("cut", [0.02, 0.1, 0.5, 0.9, 0.99, 0.999, -1, -2, -5, -8, -14, -20])
@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {"quality": 80}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_truncation_is_found_wherever_the_cut_is(fmt: str, options: dict[str, object], cut: float) -> None:
    data = encode(scene(320, 240), fmt, **options)
    short = data[: int(len(data) * cut)] if cut > 0 else data[: int(cut)]
    assert problem(short).status is Status.CORRUPT


def test_every_cut_of_a_small_jpeg_is_found() -> None:
    data = encode(scene(48, 32))
    missed = [size for size in range(len(data)) if isinstance(check(data[:size], LIMITS), ImageInfo)]
    assert missed == []


def test_random_damage_never_raises() -> None:
    rng = np.random.default_rng(0)
    for fmt in ("JPEG", "PNG", "WEBP"):
        data = encode(scene(64, 48), fmt)
        for _ in range(150):
            broken = bytearray(data)
            for position in rng.integers(0, len(data), 3):
                broken[position] = int(rng.integers(256))
            assert isinstance(check(bytes(broken), LIMITS), ImageInfo | ImageProblem)
            assert isinstance(decode_rgb(bytes(broken), WIDE_GRID, LIMITS), np.ndarray | ImageProblem)


def test_a_pixel_bomb_is_refused_from_its_header() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    for data in (bomb, bomb + png_chunk(b"IEND", b"")):
        found = problem(data)
        assert found.status is Status.TOO_LARGE
        assert "60000x60000 is 3600 megapixels" in found.reason


def test_pillows_own_pixel_limit_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Image.open would raise DecompressionBombError
    assert info(encode(scene(64, 48), "PNG")).width == 64


def test_size_limits() -> None:
    assert problem(encode(scene(5000, 1), "PNG")).status is Status.TOO_SMALL  # a 1x5000 strip
    thin = problem(encode(scene(20, 5000), "PNG"))
    assert thin.status is Status.UNSUPPORTED and "more than 200 times" in thin.reason
    assert problem(encode(scene(64, 48)), ImageLimits(min_side=49)).status is Status.TOO_SMALL
    assert problem(encode(scene(64, 48)), ImageLimits(max_image_pixels=64 * 48 - 1)).status is Status.TOO_LARGE
    assert info(encode(scene(64, 48)), ImageLimits(min_side=48, max_image_pixels=64 * 48)).height == 48
    assert isinstance(decode_rgb(encode(scene(20, 5000), "PNG"), WIDE_GRID, ImageLimits(max_aspect=900)), ImageProblem)


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_animations_are_unsupported(fmt: str) -> None:
    frames = [Image.fromarray(scene(32, 32, seed)) for seed in range(3)]
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], duration=50)
    assert problem(data) == ImageProblem(Status.UNSUPPORTED, "animated image (3 frames)")


def test_a_phones_two_picture_jpeg_is_a_photo() -> None:
    main, preview = Image.fromarray(scene(96, 64, 1)), Image.fromarray(scene(48, 32, 2))
    data = encode(main, "MPO", save_all=True, append_images=[preview])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert info(data).width == 96
    assert difference(pixels(data), scene(96, 64, 1)) < 5


def test_unusual_jpegs_are_told_apart_from_damage() -> None:
    data = encode(scene(32, 32))
    frame = data.index(b"\xff\xc0")
    twelve_bits = data[: frame + 4] + b"\x0c" + data[frame + 5 :]
    assert problem(twelve_bits) == ImageProblem(Status.UNSUPPORTED, "a JPEG with 12 bits a sample")
    lossless = data[: frame + 1] + b"\xc3" + data[frame + 2 :]
    assert problem(lossless).status is Status.UNSUPPORTED
    progressive = encode(scene(32, 32), progressive=True)
    scan = progressive.index(b"\xff\xda")
    assert "scans" in problem(progressive[:scan] + b"\xff\xda\x00\x02" * 600 + progressive[scan:]).reason


# --- pixels -----------------------------------------------------------------------------------------------------------

PATCHES = np.repeat(
    np.repeat(np.array([[[200, 30, 40], [30, 180, 60]], [[20, 60, 210], [240, 220, 40]]], np.uint8), 32, 0), 32, 1
)


def cmyk(rgb: Array) -> Array:
    return np.concatenate([255 - rgb, np.zeros_like(rgb[..., :1])], axis=-1)


def test_cmyk() -> None:
    data = encode(Image.fromarray(cmyk(PATCHES), "CMYK"), quality=95)
    assert difference(pixels(data), PATCHES) < 3
    assert info(data).width == 64


def test_ycck() -> None:
    """Adobe's YCCK. What is stored is inverted CMYK, of which libjpeg takes ``255 - CMY`` as the RGB behind its YCC."""
    ink = cmyk(PATCHES)
    as_ycc = np.asarray(Image.fromarray(ink[..., :3]).convert("YCbCr"))
    stored = np.concatenate([as_ycc, 255 - ink[..., 3:]], axis=-1)
    data = encode(Image.fromarray(255 - stored, "CMYK"), quality=95)  # Pillow inverts when it writes
    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0
    data = data[: marker + 11] + b"\x02" + data[marker + 12 :]
    assert difference(pixels(data), PATCHES) < 4


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    data = encode(Image.fromarray(ramp), "PNG")
    found = pixels(data)
    assert np.abs(found[..., 0].astype(int) - np.round(ramp / 257)).max() <= 1
    assert (found[..., 0] == found[..., 2]).all()
    assert info(data).phash == info(encode(np.round(ramp / 257).astype(np.uint8), "PNG")).phash


def test_palette_with_and_without_transparency() -> None:
    palette = Image.fromarray(PATCHES).quantize(16)
    assert difference(pixels(encode(palette, "PNG")), PATCHES) < 3
    corner = palette.getpixel((0, 0))
    seen = pixels(encode(palette, "PNG", transparency=corner))
    assert (seen[:32, :32] == 255).all()
    assert difference(seen[32:], PATCHES[32:]) < 3


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(fmt: str) -> None:
    alpha = np.zeros((64, 64, 1), np.uint8)
    alpha[:, 32:] = 128
    seen = pixels(encode(Image.fromarray(np.concatenate([PATCHES, alpha], -1), "RGBA"), fmt, lossless=True))
    assert (seen[:, :32] == 255).all()
    assert difference(seen[:, 32:], (PATCHES[:, 32:] + 255.0).astype(int) // 2) <= 2


def test_grey_alpha_and_bilevel() -> None:
    grey = np.full((32, 32), 40, np.uint8)
    both = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(np.full((32, 32), 255, np.uint8))])
    assert (pixels(encode(both, "PNG")) == 40).all()
    assert set(np.unique(pixels(encode(Image.fromarray(grey).convert("1"), "PNG")))) <= {0, 255}
    assert (pixels(encode(grey, "JPEG")) == 40).all()


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(fmt: str, orientation: int) -> None:
    upright = scene(96, 64)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(upright)
    stored = stored.transpose(undo[orientation]) if orientation > 1 else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, fmt, exif=exif, quality=95)
    found = info(data)
    assert (found.width, found.height) == (96, 64)
    assert difference(pixels(data), upright) < 5
    plain = info(encode(upright, fmt, quality=95)).phash
    assert (int(found.phash, 16) ^ int(plain, 16)).bit_count() <= 4
    small = pixels(data, ImageGrid(4, 16, 24 * 16))
    assert small.shape == (16, 24, 3)


def test_damaged_exif_counts_as_upright() -> None:
    data = encode(scene(96, 64), exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert (info(data).width, pixels(data).shape) == (96, (64, 96, 3))
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n  12\nzzzz")
    assert info(encode(scene(96, 64), "PNG", pnginfo=text)).width == 96


# --- scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(640, 480), (1024, 768), (1500, 2000), (333, 777)])
def test_dct_scaling_is_close_to_its_slow_twin(size: tuple[int, int]) -> None:
    data = encode(scene(*size), quality=90)
    grid = ImageGrid(28, 56 * 56, 224 * 224)
    fast, slow = pixels(data, grid), pixels(data, grid, dct_scaling=False)
    assert fast.shape == slow.shape
    assert difference(fast, slow) < 1


def test_dct_scaling_changes_nothing_where_nothing_is_scaled() -> None:
    data = encode(scene(112, 112))
    for grid in (ImageGrid(28, 56 * 56, 112 * 112), ImageGrid(28, 112 * 112, 224 * 224)):
        assert (pixels(data, grid) == pixels(data, grid, dct_scaling=False)).all()
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_pixels_are_writable_rows_in_order() -> None:
    found = pixels(encode(scene(640, 480)), ImageGrid(28, 56 * 56, 224 * 224))
    assert found.flags.writeable and found.flags.c_contiguous and found.dtype == np.uint8


GRIDS = [ImageGrid(28, 56 * 56, 448 * 448), ImageGrid(28, 4 * 28 * 28, 16384 * 28 * 28), ImageGrid(32, 65536, 16777216)]


@pytest.mark.parametrize("grid", GRIDS)
def test_grid_size_is_qwens_rule(grid: ImageGrid) -> None:
    """Equal to transformers' smart_resize wherever its own result holds its own limits, which then is a fixed point."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl")
    rng = np.random.default_rng(0)
    sizes = [tuple(int(v) for v in np.exp(rng.uniform(np.log(8), np.log(6000), 2))) for _ in range(3000)]
    equal = 0
    for height, width in sizes:
        if max(height, width) > 200 * min(height, width):
            continue
        ours = grid_size(height, width, grid)
        theirs = module.smart_resize(height, width, grid.factor, grid.min_pixels, grid.max_pixels)
        if grid.min_pixels <= theirs[0] * theirs[1] <= grid.max_pixels:
            assert ours == theirs
            equal += 1
        assert module.smart_resize(*ours, grid.factor, grid.min_pixels, grid.max_pixels) == ours
    assert equal > 2500  # of some 2900 that are no thinner than 200:1


def test_grid_size_where_limits_leave_few_sizes() -> None:
    square = ImageGrid(28, 112 * 112, 112 * 112)  # 16 cells exactly: Qwen's rule would swing between 12 and 20
    assert grid_size(100, 150, square) == (112, 112)
    assert grid_size(100, 400, square) == (56, 224)
    assert grid_size(100, 900, square) == (28, 448)
    assert grid_size(5000, 28, square) == (448, 28)
    with pytest.raises(ValueError, match="200 times"):
        grid_size(10, 2001, square)
    with pytest.raises(ValueError, match="no size in multiples of 28"):
        grid_size(100, 100, ImageGrid(28, 12_500, 12_500))


# --- perceptual hash --------------------------------------------------------------------------------------------------


# str(imagehash.phash(Image.fromarray(scene(256, 192, seed)))) for seed 0 to 3, by imagehash 4.3.2
IMAGEHASH = ["91e5e1f0aab842af", "c9321dd3d2d748d4", "d6886303a6b759e5", "996d62c674333875"]


def test_phash_is_imagehashs() -> None:
    assert [info(encode(scene(256, 192, seed), "PNG")).phash for seed in range(4)] == IMAGEHASH


def test_phash_of_flat_and_scaled_images() -> None:
    assert info(encode(np.full((64, 64, 3), 90, np.uint8), "PNG")).phash == "8000000000000000"
    large = scene(1024, 768, 3)
    small = np.asarray(Image.fromarray(large).resize((200, 150), Image.Resampling.LANCZOS))
    hashes = [int(info(data).phash, 16) for data in (encode(large), encode(large, "PNG"), encode(small, "WEBP"))]
    assert max((a ^ b).bit_count() for a in hashes for b in hashes) <= 4
    assert (hashes[0] ^ int(info(encode(scene(1024, 768, 4))).phash, 16)).bit_count() > 16


def test_headers_are_read_without_pixels() -> None:
    for fmt in ("JPEG", "PNG", "WEBP"):
        header = read_header(encode(scene(50, 40), fmt))
        assert not isinstance(header, ImageProblem)
        assert (header.width, header.height, header.frames) == (50, 40, 1)
    assert sniff(encode(scene(50, 40), "PNG")[:16]) == "png"
