"""What an image looks like, in three sizes: two 64-bit hashes to find candidates by, and a signature to confirm them.

A pHash is blind to colour and to what is small: scenes that differ in one object have the same one. So a pair that it
proposes counts only if the signatures agree: the picture's luma in 64x64 cells and its chroma in 32x32, compared under
one change of brightness and under the crops of :data:`MARGINS`. The thresholds are measured on rendered scenes and
smooth pictures with known copies (``tests/stages/test_dedup.py`` states what they give by kind).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..models.images import phash

U64 = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint8]  # (n, SIGNATURE_BYTES)
Floats = npt.NDArray[np.float32]

LUMA, CHROMA = 64, 32  # cells a side that are kept: the more, the better a crop between them is estimated
FINE, COARSE = 32, 16  # cells a side that are compared
SIGNATURE_BYTES = LUMA**2 + 2 * CHROMA**2
DECODED_SIDE = 128  # pixels: from fewer, a picture and its smaller copy give different cells
INNER_MARGIN = 0.02  # of each side: the second hash is that of a copy which lost so much
MARGINS = (
    0.0,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.035,
    0.04,
)  # crops of each side that the signatures are compared under

MAX_FINE = 24.0  # luma levels of 255: mean of the 16 worst of 1024 cells, pictures not cropped
MAX_CHROMA = 20.0  # mean of the 4 worst of 256 cells, pictures not cropped
MAX_CROPPED = 22.0  # mean of the 4 worst of 256 cells in luma and chroma, one picture cropped
_CLIPPED = 235.0  # cells this bright may have been cut off at 255, and say nothing of a change in brightness
_GAIN = 4 / 3  # the largest change in brightness, up or down


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
    inner = grey.resize((FINE, FINE), Image.Resampling.LANCZOS, box=(dx, dy, width - dx, height - dy))
    luma, blue, red = image.convert("YCbCr").split()
    cells = [luma.resize((LUMA, LUMA), Image.Resampling.BOX)]
    cells += [band.resize((CHROMA, CHROMA), Image.Resampling.BOX) for band in (blue, red)]
    return Looks(int(phash(grey), 16), int(phash(inner), 16), b"".join(each.tobytes() for each in cells))


def same_picture(a: Signatures, b: Signatures) -> npt.NDArray[np.bool_]:
    """Which pairs ``(a[i], b[i])`` show one picture, ``(n,)``. Symmetric.

    The crop under which a pair agrees best on the whole decides how strictly its worst places are judged: pictures
    that lie on each other exactly must agree in every place; of one that was cropped the cells can only be estimated.
    """
    (luma_a, chroma_a), (luma_b, chroma_b) = _planes(a), _planes(b)
    whole_a, whole_b = _coarse(luma_a, chroma_a, 0.0), _coarse(luma_b, chroma_b, 0.0)
    error, _ = _difference(whole_a, whole_b)
    fine, chroma = _fine_difference(_halved(luma_a), _halved(luma_b), _halved(chroma_a), _halved(chroma_b))
    same = (fine <= MAX_FINE) & (chroma <= MAX_CHROMA)
    for margin in MARGINS[1:]:
        for one, other in (
            (_coarse(luma_a, chroma_a, margin), whole_b),
            (whole_a, _coarse(luma_b, chroma_b, margin)),
        ):
            found, worst = _difference(one, other)
            better = found < error
            same = np.where(better, worst <= MAX_CROPPED, same)
            error = np.minimum(error, found)
    return same


def _planes(signatures: Signatures) -> tuple[Floats, Floats]:
    """Luma ``(n, 64, 64)`` and chroma ``(n, 2, 32, 32)``, the latter around zero."""
    values = signatures.astype(np.float32)
    luma, chroma = values[:, : LUMA**2], values[:, LUMA**2 :]
    return luma.reshape(-1, LUMA, LUMA), chroma.reshape(-1, 2, CHROMA, CHROMA) - np.float32(128)


def _halved(plane: Floats) -> Floats:
    """Means of 2x2 cells."""
    *lead, rows, columns = plane.shape
    means: Floats = plane.reshape(*lead, rows // 2, 2, columns // 2, 2).mean(axis=(-3, -1))
    return means


def _coarse(luma: Floats, chroma: Floats, margin: float) -> Floats:
    """All three planes of the picture without ``margin`` at each side, ``(n, 3, 16, 16)``."""
    fine, coarse = _overlap(LUMA, margin), _overlap(CHROMA, margin)
    small: Floats = np.concatenate([(fine @ luma @ fine.T)[:, None], coarse @ chroma @ coarse.T], axis=1)
    return small


def _overlap(cells: int, margin: float) -> Floats:
    """``(16, cells)``: the share of ``cells`` in each of 16 over the same line less its margins. Rows sum to 1."""
    edges = (margin + (1 - 2 * margin) * np.arange(COARSE + 1) / COARSE) * cells
    grid = np.arange(cells)
    share = np.minimum(edges[1:, None], grid + 1) - np.maximum(edges[:-1, None], grid)
    share = np.maximum(share, 0)
    out: Floats = (share / share.sum(axis=1, keepdims=True)).astype(np.float32)
    return out


def _gains(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """What to multiply lumas ``(n, ...)`` by so that both are as bright as the brighter one; each ``(n,)``."""
    axes = tuple(range(1, a.ndim))
    clear = (a < _CLIPPED) & (b < _CLIPPED)
    of_a, of_b = (np.sum(each * each * clear, axis=axes) + 1 for each in (a, b))
    gain = np.clip(np.sqrt(of_b / of_a), 1 / _GAIN, _GAIN)
    return np.maximum(gain, 1), np.maximum(1 / gain, 1)


def _difference(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Mean difference and that of the 4 worst cells of planes ``(n, 3, 16, 16)``; each ``(n,)``."""
    scale_a, scale_b = (scale[:, None, None, None] for scale in _gains(a[:, 0], b[:, 0]))
    # 255 is the top of luma; chroma never comes near it
    apart = np.abs(np.minimum(a * scale_a, 255) - np.minimum(b * scale_b, 255)).max(axis=1)
    return apart.mean(axis=(1, 2)), _worst(apart, 4)


def _fine_difference(luma_a: Floats, luma_b: Floats, chroma_a: Floats, chroma_b: Floats) -> tuple[Floats, Floats]:
    """The worst cells of pictures laid on each other as they are, in luma and in chroma; each ``(n,)``."""
    gain_a, gain_b = _gains(luma_a, luma_b)
    a, b = (np.minimum(x * gain[:, None, None], 255) for x, gain in ((luma_a, gain_a), (luma_b, gain_b)))
    colour = np.abs(chroma_a * gain_a[:, None, None, None] - chroma_b * gain_b[:, None, None, None]).max(axis=1)
    return _worst(np.abs(a - b), 16), _worst(colour, 4)


def _worst(cells: Floats, count: int) -> Floats:
    """Mean of the ``count`` largest of each ``(n, rows, columns)``."""
    flat = cells.reshape(len(cells), -1)
    worst: Floats = np.partition(flat, flat.shape[1] - count, axis=1)[:, -count:].mean(axis=1)
    return worst
