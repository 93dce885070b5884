"""Perceptual hashes: two 64-bit hashes to find candidate pairs, and a signature to confirm them.

A pHash ignores colour and small details: scenes that differ in one object have the same one. So a candidate pair counts
only if the signatures agree (:mod:`.signatures.confirm`): the image's luma in 64x64 cells and its chroma in 32x32, each
cell filtered by a triangle two cells wide. Thus cells vary smoothly as the image moves, and their values under a small
crop can be interpolated.
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
DECODED_SIDE = 128  # pixels; with fewer, an image and its downscaled copy get different cells
INNER_MARGIN = 0.02  # fraction cropped from each side for the second hash
_HASHED = 32


@dataclass(frozen=True, slots=True)
class Looks:
    """``phash``: of the image; ``inner``: of its centre; ``signature``: :data:`SIGNATURE_BYTES` bytes."""

    phash: int
    inner: int
    signature: bytes

    @property
    def look(self) -> int:
        """64-bit digest of the signature."""
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
    return Looks(int(phash(grey), 16), int(phash(inner), 16), b"".join(plane.tobytes() for plane in cells))
