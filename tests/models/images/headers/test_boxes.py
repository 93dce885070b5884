"""Files made of boxes: walked within limits, whatever sizes they give."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import AvifImagePlugin, Image

from capipe.models.images.headers.boxes import MAX_BOXES, Box, boxes, top_boxes
from capipe.models.images.headers.heif import read_heif
from capipe.models.images.headers.jxl import read_jxl
from capipe.models.images.headers.structure import Structure, UnusableImage

from ..test_decode import encode, scene


def box(kind: bytes, body: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack(">I4s", 8 + len(body) if size is None else size, kind) + body


def test_sizes_of_all_kinds() -> None:
    data = box(b"one ", b"abc") + struct.pack(">I4sQ", 1, b"two ", 16 + 2) + b"de" + box(b"end ", b"rest", size=0)
    found, whole = top_boxes(data)
    assert [kind for kind, _, _ in found] == [b"one ", b"two ", b"end "] and whole
    assert [data[start:end] for _, start, end in found] == [b"abc", b"de", b"rest"]
    assert not top_boxes(data[:18])[1] and top_boxes(b"") == ([], False)
    assert not top_boxes(box(b"one ", b"abc", size=400))[1]
    assert list(boxes(data, 0, 11)) == [Box(b"one ", 8, 11)]


@pytest.mark.parametrize("size", [2, 7])
def test_a_box_smaller_than_its_header(size: int) -> None:
    with pytest.raises(UnusableImage, match=f"a box of {size} bytes at byte 0"):
        top_boxes(box(b"one ", size=size))


def test_more_boxes_than_any_file_has() -> None:
    with pytest.raises(UnusableImage, match=f"over {MAX_BOXES} boxes"):
        top_boxes(box(b"free") * (MAX_BOXES + 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotations_of_an_avif_are_read_as_pillow_reads_them(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene(48, 32), "AVIF", exif=exif)
    pillows = AvifImagePlugin.AvifImageFile(io.BytesIO(data)).getexif().get(0x0112, 1)
    assert read_heif(data).orientation == pillows == orientation


def jxl(bits: str) -> bytes:
    """A codestream with these first bits."""
    return b"\xff\x0a" + int(bits[::-1], 2).to_bytes(16, "little")


@pytest.mark.parametrize(
    ("bits", "size"),
    [
        ("1" + "11000" + "100" + "0" * 40, (32, 32)),  # 8 x (3 + 1), and a square
        ("1" + "11000" + "110" + "0" * 40, (42, 32)),  # 4:3
        ("1" + "11000" + "000" + "10000" + "0" * 40, (16, 32)),
        ("0" + "00" + "110001100" + "111" + "0" * 40, (200, 100)),  # 1 + 99, and 2:1
        ("0" + "00" + "110001100" + "000" + "10" + "0000000000011" + "0" * 40, (6145, 100)),
    ],
)
def test_sizes_in_a_jpeg_xl_codestream(bits: str, size: tuple[int, int]) -> None:
    assert read_jxl(jxl(bits)) == Structure(*size)
    signature = box(b"JXL ", b"\r\n\x87\n")
    assert read_jxl(signature + box(b"ftyp", b"jxl \0\0\0\0jxl ") + box(b"jxlc", jxl(bits))) == Structure(*size)
    parts = box(b"jxlp", b"\0\0\0\0" + jxl(bits)) + box(b"jxlp", b"\x80\0\0\1more")
    assert read_jxl(signature + parts) == Structure(*size)
    with pytest.raises(UnusableImage, match="without an image"):
        read_jxl(signature)
