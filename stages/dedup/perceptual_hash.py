"""What an image looks like, in three sizes: two 64-bit hashes to find candidates by, and a signature to confirm them.

A pHash is blind to colour and to what is small: scenes that differ in one object have the same one. So a pair that it
proposes counts only if the signatures agree (``same_picture.py``): the picture's luma in 64x64 cells and its chroma in
32x32, each cell read through a triangle two cells wide. So cells change smoothly as a picture is moved under them, and
what they would be under a small crop can be computed from what they are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...models.images.decode import phash

Signatures = npt.NDArray[np.uint8]  # (n, SIGNATURE_BYTES)

LUMA, CHROMA = 64, 32  # cells a side
SIGNATURE_BYTES = LUMA**2 + 2 * CHROMA**2
DECODED_SIDE = 128  # pixels: from fewer, a picture and its smaller copy give different cells
INNER_MARGIN = 0.02  # of each side: the second hash is that of a copy which lost so much
_HASHED = 32


@dataclass(frozen=True, slots=True)
class Looks:
    """``phash`` of the picture, ``inner``: of its middle; ``signature``: :data:`SIGNATURE_BYTES` bytes."""

    phash: int
    inner: int
    signature: bytes

    @property
    def look(self) -> int:
        """Equal for equal signatures: 64 bits of their digest."""
        return int.from_bytes(hashlib.blake2b(self.signature, digest_size=8).digest())


def looks(image: Image.Image) -> Looks:
    """Hashes and signature of an RGB image of any size. Pure."""
    grey = image.convert("L")
    width, height = grey.size
    dx, dy = width * INNER_MARGIN, height * INNER_MARGIN
    inner = grey.resize((_HASHED, _HASHED), Image.Resampling.LANCZOS, box=(dx, dy, width - dx, height - dy))
    luma, blue, red = image.convert("YCbCr").split()
    cells = [luma.resize((LUMA, LUMA), Image.Resampling.BILINEAR)]
    cells += [band.resize((CHROMA, CHROMA), Image.Resampling.BILINEAR) for band in (blue, red)]
    return Looks(int(phash(grey), 16), int(phash(inner), 16), b"".join(each.tobytes() for each in cells))
