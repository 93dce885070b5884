"""Files that other programs wrote, as ImageMagick shows them: `formats/make.sh` made both."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capipe.manifests.files.image_types import FURTHER, IMAGE_TYPES
from capipe.models.images.decode import EVERYTHING, ImageInfo, ImageLimits, check, decode_rgb, decode_upright
from capipe.models.images.openers import missing

from .test_decode import WIDE_GRID

FOLDER = Path(__file__).parent / "formats"
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix not in (".sh", ".png"))
LIMITS = ImageLimits(accept=EVERYTHING)
#: Files with fewer samples of color than pixels, whose edges decoders smooth in their own ways: compared off the edges.
SUBSAMPLED = ("420",)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_colors_are_within_two_levels_of_imagemagicks(path: Path) -> None:
    kind = next(kind for kind in IMAGE_TYPES.values() if path.suffix[1:] in (kind.name, *kind.others))
    if (reason := missing(kind.name)) is not None:
        pytest.skip(reason)
    data = path.read_bytes()
    expected = np.asarray(Image.open(io.BytesIO(path.with_name(f"{path.name}.png").read_bytes())).convert("RGB"))
    found = decode_upright(data, LIMITS)
    assert isinstance(found, Image.Image), found
    assert found.size == (expected.shape[1], expected.shape[0])
    difference = np.abs(np.asarray(found).astype(int) - expected)
    if any(word in path.stem for word in SUBSAMPLED):
        inside = [at for at in range(16) if at % 8 in (2, 3, 4, 5)]
        difference = difference[np.ix_(inside, [*inside, *(16 + at for at in inside[:4])])]
    assert difference.max() <= 2, difference.max(axis=(0, 1))
    info = check(data, LIMITS)
    assert isinstance(info, ImageInfo) and (info.format, info.width, info.height) == (kind.name, *found.size)
    assert (np.asarray(decode_rgb(data, WIDE_GRID, LIMITS)) == np.asarray(found)).all()


def test_the_files_are_of_all_formats_and_small() -> None:
    kinds = {kind for kind in FURTHER for path in FILES if path.suffix[1:] in (kind, *IMAGE_TYPES[kind].others)}
    assert {"avif", "gif", "bmp", "tiff", "heic", "jxl"} <= kinds
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert max(sizes.values()) < 6000 and sum(sizes.values()) < 60_000
