"""Single images out of tars that others wrote."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable

import pytest

from capipe.pipeline.inspect.images import TarImages

from ...conftest import photo, tar_bytes


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_images_are_found_in_any_order(pack: Callable[[bytes], bytes]) -> None:
    images = {f"{number}": photo(number) for number in range(5)}
    data = pack(tar_bytes({f"{key}.jpg": image for key, image in images.items()}))
    tar = TarImages(lambda: io.BytesIO(data))
    for key in ("3", "0", "4", "3"):
        assert tar.read(key) == images[key]
    assert tar.read("5") is None
