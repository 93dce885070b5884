"""Formats beyond JPEG, PNG and WebP: shown as a viewer shows them, within limits, or refused with a reason."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from capipe.errors import BadInput, RunFailed
from capipe.manifests.files.image_types import COMMON, FURTHER, IMAGE_TYPES
from capipe.manifests.status import Status
from capipe.models.images.decode import (
    ANIMATED,
    EVERYTHING,
    ImageInfo,
    ImageLimits,
    check,
    decode_rgb,
    decode_upright,
    is_plain,
    plain_copy,
    thumbnail,
)
from capipe.models.images.decode_pool import check_for_server, decode_batch
from capipe.models.images.encoding import Encoding
from capipe.models.images.formats import Format, Header, ImageProblem, read_header, sniff
from capipe.models.images.openers import check_decoders, decodable, missing

from ...profiles import PERMUTED, SRGB_CURVE, muted, rgb_profile, stored
from .test_decode import WIDE_GRID, Array, encode, scene
from .test_icc import apart

ALL = ImageLimits(accept=EVERYTHING)
PICTURE = scene(96, 64)


def jxl(image: Array | Image.Image, **options: object) -> bytes:
    pytest.importorskip("pillow_jxl", reason="the extra 'jxl' is not installed")
    return encode(image, "JXL", **options)


def heic(image: Array | Image.Image, **options: object) -> bytes:
    pytest.importorskip("pillow_heif", reason="the extra 'heif' is not installed").register_heif_opener()
    return encode(image, "HEIF", **options)


def written(kind: str, image: Array | Image.Image = PICTURE) -> bytes:
    """An image in a format, as exact as Pillow and its plugins write it."""
    match kind:
        case "heic":
            return heic(image, quality=-1, chroma=444)
        case "jxl":
            return jxl(image, lossless=True)
        case "avif":
            return encode(image, "AVIF", quality=100, subsampling="4:4:4")
        case "gif":
            whole = image if isinstance(image, Image.Image) else Image.fromarray(image)
            return encode(whole.quantize(200), "GIF")
        case "ico":
            return encode(image, "ICO", sizes=[(96, 64)])
        case "jp2":
            return encode(image, "JPEG2000")
    return encode(image, kind.upper())


def shown(data: bytes) -> Array:
    found = decode_upright(data, ALL)
    assert isinstance(found, Image.Image), found
    return np.asarray(found)


def problem(data: bytes, limits: ImageLimits = ALL) -> ImageProblem:
    """The problem with ``data``, the same at every door."""
    found = check(data, limits)
    assert isinstance(found, ImageProblem), found
    assert found == decode_upright(data, limits) == decode_rgb(data, WIDE_GRID, limits) == thumbnail(data, limits, 64)
    return found


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FURTHER)
def test_a_still_image_is_taken_where_it_is_accepted(kind: Format) -> None:
    data = written(kind)
    assert sniff(data) == kind and read_header(data) == Header(kind, 96, 64)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) if kind == "gif" else PICTURE
    assert apart(shown(data), expected) <= {"avif": 3, "heic": 2}.get(kind, 0)
    info = check(data, ALL)
    assert isinstance(info, ImageInfo) and (info.format, info.width, info.height, info.frames) == (kind, 96, 64, 1)
    small = decode_rgb(data, WIDE_GRID, ALL)
    assert isinstance(small, np.ndarray) and apart(small, shown(data)) == 0
    refused = check(data, ImageLimits(accept=EVERYTHING - {kind}))
    assert refused == ImageProblem(Status.UNSUPPORTED, f"not a JPEG, PNG or WebP image: {IMAGE_TYPES[kind].words}")
    assert check(data, ImageLimits()) == refused


@pytest.mark.parametrize("kind", FURTHER)
def test_servers_get_a_copy_in_a_format_that_they_read(kind: Format) -> None:
    data = written(kind)
    assert not is_plain(data)
    copy = check_for_server(data, limits=ALL)
    assert isinstance(copy, bytes) and sniff(copy) == "png" and is_plain(copy) and copy == plain_copy(data, ALL)
    assert apart(shown(copy), shown(data)) == 0
    assert isinstance(check_for_server(data, limits=ImageLimits()), ImageProblem)


@pytest.mark.parametrize("kind", ["tiff", "avif", "heic"])
def test_it_is_upright_once_and_in_srgb(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"heic": {"quality": -1, "chroma": 444}, "avif": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    write = heic if kind == "heic" else lambda image, **more: encode(image, kind.upper(), **more)
    data = write(PICTURE, exif=exif.tobytes(), **options)
    turned = np.asarray(Image.fromarray(PICTURE).transpose(Image.Transpose.ROTATE_270))
    assert apart(shown(data), turned) <= 3
    info = check(data, ALL)
    assert isinstance(info, ImageInfo) and (info.width, info.height) == (64, 96)
    assert apart(np.asarray(decode_rgb(data, WIDE_GRID, ALL)), shown(data)) == 0
    picture = muted(PICTURE)
    profile = rgb_profile(PERMUTED, SRGB_CURVE)
    data = write(stored(picture, PERMUTED, SRGB_CURVE), icc_profile=profile, **options)
    assert apart(shown(data), picture) <= 3


def test_kinds_of_pixels() -> None:
    deep = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for data in (encode(Image.fromarray(deep), "TIFF"), encode(Image.fromarray(deep), "JPEG2000")):
        assert apart(shown(data)[..., 0], np.round(deep / 257).astype(np.uint8)) <= 1
    clear = np.concatenate([PICTURE, np.zeros((64, 96, 1), np.uint8)], axis=-1)
    for kind in ("TIFF", "AVIF", "JPEG2000"):
        assert (shown(encode(clear, kind)) == 255).all()
    for mode in ("CMYK", "1", "L", "P"):
        image = Image.fromarray(PICTURE).convert(mode)
        assert apart(shown(encode(image, "TIFF")), np.asarray(image.convert("RGB"))) == 0


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("F", (64, 64)), "32 bits a sample"),
        (Image.new("I", (64, 64)), "32 bits a sample"),
        (Image.new("LAB", (64, 64)), "photometric interpretation 8"),
    ],
)
def test_pixels_that_have_no_levels_in_srgb_are_refused(image: Image.Image, reason: str) -> None:
    found = problem(encode(image, "TIFF"))
    assert found.status is Status.UNSUPPORTED and reason in found.reason


# --- several frames ---------------------------------------------------------------------------------------------------


SECOND = [Image.fromarray(scene(96, 64, 2))]


@pytest.mark.parametrize("kind", ["gif", "tiff", "avif"])
def test_of_several_frames_or_pages_the_first_is_taken(kind: str) -> None:
    options = {"quality": 100, "subsampling": "4:4:4"} if kind == "avif" else {}
    data = encode(PICTURE, kind.upper(), save_all=True, append_images=SECOND, **options)
    info = check(data, ALL)
    assert isinstance(info, ImageInfo) and info.frames == 2
    assert np.abs(shown(data).astype(int) - PICTURE).mean() < (12 if kind == "gif" else 2)


def test_animated_common_formats_only_where_they_are_accepted() -> None:
    for kind in ("PNG", "WEBP"):
        data = encode(PICTURE, kind, save_all=True, append_images=SECOND, lossless=True)
        assert problem(data, ImageLimits()).reason == "animated image (2 frames)"
        assert problem(data, ImageLimits(accept=EVERYTHING - {ANIMATED})).reason == "animated image (2 frames)"
        assert apart(shown(data), PICTURE) == 0 and not is_plain(data)
        assert isinstance(check_for_server(data, limits=ALL), bytes)


def test_several_images_in_a_heif_file() -> None:
    data = heic(PICTURE, quality=-1, chroma=444, save_all=True, append_images=SECOND)
    assert apart(shown(data), PICTURE) <= 3


def gif(frames: bytes, width: int = 32, height: int = 32) -> bytes:
    """A GIF with a global palette of red, green, blue and white."""
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255])
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x81, 0, 0) + palette + frames + b";"


def gif_frame(left: int, top: int, width: int, height: int) -> bytes:
    """A frame of the palette's second color: codes of one byte, each followed by a reset (LZW of 7 bits)."""
    codes = b"".join(bytes([0x80, 1]) for _ in range(width * height)) + b"\x81"
    blocks = b"".join(bytes([len(part)]) + part for part in (codes[at : at + 254] for at in range(0, len(codes), 254)))
    return b"," + struct.pack("<HHHHB", left, top, width, height, 0) + b"\x07" + blocks + b"\0"


def test_what_a_gifs_first_frame_leaves_free_is_white() -> None:
    data = gif(gif_frame(8, 4, 16, 20) + gif_frame(0, 0, 32, 32))
    expected = np.full((32, 32, 3), 255, np.uint8)
    expected[4:24, 8:24] = (0, 255, 0)
    assert apart(shown(data), expected) == 0
    info = check(data, ALL)
    assert isinstance(info, ImageInfo) and info.frames == 2
    larger = gif(gif_frame(0, 0, 40, 33))  # decoders enlarge the canvas
    assert read_header(larger) == Header("gif", 40, 33) and shown(larger).shape == (33, 40, 3)


# --- damage and limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FURTHER)
def test_truncated_files_are_corrupt(kind: str) -> None:
    data = written(kind)
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        found = problem(data[: max(20, int(len(data) * share))])
        assert found.status is Status.CORRUPT, (share, found)


@pytest.mark.parametrize("kind", FURTHER)
def test_damaged_files_are_a_result_or_a_problem(kind: str) -> None:
    data, rng = written(kind), np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(data)
        for at in rng.integers(4, min(len(data), 400), 3):
            broken[at] = int(rng.integers(256))
        (found,), _ = decode_batch([bytes(broken)], decode=lambda image: check(image, ALL))
        assert isinstance(found, ImageInfo | ImageProblem)


def huge(kind: str) -> bytes:
    """An image whose header says 60,000 x 60,000."""
    data, sides = written(kind), struct.pack("<II", 60_000, 60_000)
    match kind:
        case "bmp":
            return data[:18] + sides + data[26:]
        case "gif":
            return data[:6] + struct.pack("<HH", 60_000, 60_000) + data[10:]
        case "tiff":
            at = struct.unpack_from("<I", data, 4)[0] + 2
            tags = {struct.unpack_from("<H", data, at + 12 * n)[0]: at + 12 * n for n in range(2)}
            changed = bytearray(data)
            for tag in (256, 257):
                changed[tags[tag] : tags[tag] + 12] = struct.pack("<HHII", tag, 4, 1, 60_000)
            return bytes(changed)
        case "avif" | "heic":
            at = data.index(b"ispe") + 8
            return data[:at] + struct.pack(">II", 60_000, 60_000) + data[at + 8 :]
        case "jp2":
            at = data.index(b"ihdr") + 4
            return data[:at] + struct.pack(">II", 60_000, 60_000) + data[at + 8 :]
        case "jxl":  # size given in full: no division by 8, 30 bits of height, no ratio, 30 bits of width
            bits = "0" + "11" + f"{59_999:030b}"[::-1] + "000" + "11" + f"{59_999:030b}"[::-1]
            return b"\xff\x0a" + int(bits[::-1], 2).to_bytes(9, "little") + bytes(200)
    at = 6 + 16 + 16  # the PNG in an icon
    return data[:at] + struct.pack(">II", 60_000, 60_000) + data[at + 8 :]


@pytest.mark.parametrize("kind", FURTHER)
def test_bombs_are_told_by_their_headers(kind: str) -> None:
    found = problem(huge(kind))
    assert found.status is Status.TOO_LARGE and "3600 megapixels" in found.reason
    assert (
        problem(written(kind), ImageLimits(accept=EVERYTHING, max_image_pixels=96 * 64 - 1)).status is Status.TOO_LARGE
    )
    assert problem(written(kind), ImageLimits(accept=EVERYTHING, min_side=65)).status is Status.TOO_SMALL


def test_a_gif_without_a_frame() -> None:
    assert problem(gif(b"")) == ImageProblem(Status.CORRUPT, "a GIF without an image")
    assert "no GIF block at byte" in problem(gif(b"\x55")).reason
    assert "over 1000 frames" in problem(gif(gif_frame(0, 0, 16, 16) * 1001)).reason


def tiff(*tags: tuple[int, int], pages: int = 1, subfile: int = 0) -> bytes:
    """A gray TIFF of 16 x 16 with further tags; all pages are of the same pixels."""
    own = {254: 0, 256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 256, **dict(tags)}
    data = b"II*\0" + struct.pack("<I", 8 + 256) + bytes(range(256))
    for page in range(pages):
        entries = {**own, 254: subfile if page else own[254]}
        size = 2 + 12 * len(entries) + 4
        following = len(data) + size if page + 1 < pages else 0
        body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
        data += struct.pack("<H", len(entries)) + body + struct.pack("<I", following)
    return data


def test_tiffs_of_many_pages() -> None:
    assert read_header(tiff(pages=7)) == Header("tiff", 16, 16, 7)
    assert read_header(tiff(pages=7, subfile=1)) == Header("tiff", 16, 16)  # smaller copies of the first
    assert shown(tiff(pages=7)).shape == (16, 16, 3)
    assert problem(tiff(pages=10_000)) == ImageProblem(Status.UNSUPPORTED, "a TIFF of over 1000 pages")
    data = tiff(pages=3)
    circle = data[:-4] + struct.pack("<I", 8 + 256)
    assert problem(circle) == ImageProblem(Status.CORRUPT, "a TIFF whose pages are in a circle")
    assert problem(data[:-20]).status is Status.CORRUPT


@pytest.mark.parametrize(
    ("tag", "value", "reason"),
    [
        (259, 34712, "compression 34712"),  # JPEG 2000
        (259, 6, "compression 6"),  # JPEG as first specified
        (262, 32803, "photometric interpretation 32803"),  # a sensor's mosaic
        (258, 12, "12 bits a sample"),
        (339, 3, "floating-point"),
        (254, 1, "begins with a thumbnail"),
    ],
)
def test_exotic_tiffs_are_refused_by_name(tag: int, value: int, reason: str) -> None:
    found = problem(tiff((tag, value)))
    assert found.status is Status.UNSUPPORTED and reason in found.reason


def test_tiles_as_large_as_a_bomb() -> None:
    found = problem(tiff((322, 65_536), (323, 65_536)))
    assert found == ImageProblem(Status.TOO_LARGE, "a TIFF with tiles of 65536x65536")


def test_names_say_nothing_and_content_all() -> None:
    assert sniff(b"BM is a car maker") == "bmp" and problem(b"BM is a car maker").status is Status.CORRUPT
    assert sniff(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom") == ImageProblem(
        Status.UNSUPPORTED, "not a JPEG, PNG or WebP image: an MP4 or QuickTime file"
    )
    assert sniff(b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif") == "avif"
    assert sniff(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic") == "heic"


# --- decoders that are not installed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "module", "extra"), [("heic", "pillow_heif", "heif"), ("jxl", "pillow_jxl", "jxl")])
def test_without_the_extra_one_line_names_it(
    kind: Format, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(kind)
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    monkeypatch.setitem(sys.modules, module, None)
    assert kind not in decodable() and {*COMMON, "gif"} <= decodable()
    advice = f"{kind} needs the package {module}: pip install 'capipe[{extra}]'"
    assert missing(kind) == advice
    with pytest.raises(BadInput) as refused:
        check_decoders(["gif", kind])
    assert str(refused.value) == f"--accept {advice}; or leave out {kind}"
    with pytest.raises(RunFailed, match=f"there are {kind} images, and {kind} needs the package {module}"):
        decode_batch([data], decode=lambda image: check(image, ALL))
    assert check(data, ImageLimits()) == ImageProblem(
        Status.UNSUPPORTED, f"not a JPEG, PNG or WebP image: {IMAGE_TYPES[kind].words}"
    )


# --- encoding anew ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["jpeg", "webp", "png"])
def test_images_are_encoded_anew_as_they_are_shown(codec: str) -> None:
    data = written("bmp")
    found = check(data, ALL, Encoding(codec, 95))  # type: ignore[arg-type]
    assert isinstance(found, ImageInfo) and found.transcoded is not None
    assert found.format == {"jpeg": "jpg"}.get(codec, codec) == sniff(found.transcoded.data)
    assert found.transcoded.original == "bmp" and is_plain(found.transcoded.data)
    assert np.abs(shown(found.transcoded.data).astype(int) - PICTURE).mean() < (0.1 if codec == "png" else 3)
    again = check(data, ALL, Encoding(codec, 95))  # type: ignore[arg-type]
    assert again == found
    common = encode(PICTURE)
    kept = check(common, ALL, Encoding(codec, 95))  # type: ignore[arg-type]
    assert isinstance(kept, ImageInfo) and kept.transcoded is None


def test_quality_counts_and_lengths_have_ends() -> None:
    sizes = []
    for quality in (20, 95):
        found = check(written("bmp"), ALL, Encoding("jpeg", quality))
        assert isinstance(found, ImageInfo) and found.transcoded is not None
        sizes.append(len(found.transcoded.data))
    assert sizes[0] < sizes[1] / 2
    long = encode(Image.new("RGB", (16_400, 16)), "BMP")
    limits = ImageLimits(accept=EVERYTHING, max_aspect=2000)
    found = check(long, limits, Encoding("webp"))
    assert isinstance(found, ImageProblem) and found.status is Status.UNSUPPORTED and "webp" in found.reason
    assert isinstance(check(long, limits, Encoding("jpeg")), ImageInfo)
