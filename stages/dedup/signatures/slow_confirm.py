"""Confirmation of duplicate pairs by signature: copies (re-encoded, resized, brightened, slightly cropped) or not.

Traces of copying are spread over the image, or follow its detail: edges, texture. Another shape, word or colour is a
local difference, also where one of the images is flat. So the two are aligned, matched in brightness, and judged by the
largest local difference, relative to the local detail of the flatter one. Luma and chroma differences are combined, as
a change that is small in one is mostly visible in the other.
The bounds are fitted to rendered scenes with known copies (docs/benchmarks.md has results on others, and on
photographs).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Bools, Floats
from ..perceptual_hash import CHROMA, LUMA, Signatures
from .slow_registration import displacement, fitted, gain, halved, is_crop, warped

HOPELESS = 40.0  # levels of 255: mean difference above which no crop of this size can explain the difference
LARGEST_CROP = 0.045  # fraction of a side, cropped at either end
ALIGNED = 0.004  # fraction of a side: tolerance of frames for inexact fits

NOISE = np.float32(10)  # levels of 255 that a copy may differ by in flat areas
BUSY = np.float32(0.15)  # plus this fraction of the local range of levels
MIXED = np.float32(0.6)  # fraction of the neighbours' clipping loss that a mixed cell may have lost
RIM = 2  # cells along the edges, which a crop changes: their filters end at the edge
_PAIRS = 128  # per batch: some 100 MB


@dataclass(frozen=True)
class _Pictures:
    """RGB cells ``(n, 3, 64, 64)`` and their luma ``(n, 64, 64)``."""

    rgb: Floats
    luma: Floats

    def __getitem__(self, chosen: Bools) -> _Pictures:
        return _Pictures(self.rgb[chosen], self.luma[chosen])


def same_picture(a: Signatures, b: Signatures) -> Bools:
    """True for pairs ``(a[i], b[i])`` that show the same image, ``(n,)``. Symmetric."""
    a, b = ordered(a, b)
    parts = [
        _same(_pictures(a[start : start + _PAIRS]), _pictures(b[start : start + _PAIRS]))
        for start in range(0, len(a), _PAIRS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def ordered(a: Signatures, b: Signatures) -> tuple[Signatures, Signatures]:
    """Sort each pair, so that the result does not depend on the order of the arguments."""
    first = (a != b).argmax(axis=1)
    rows = np.arange(len(a))
    swap = (a[rows, first] > b[rows, first])[:, None]
    return np.where(swap, b, a), np.where(swap, a, b)


def _same(a: _Pictures, b: _Pictures) -> Bools:
    same: Bools = _difference(a, b, np.ones(b.luma.shape, dtype=bool)) <= 1
    mean = np.abs(halved(halved(a.luma)) - halved(halved(b.luma))).mean(axis=(1, 2))
    rest = ~same & (mean <= HOPELESS)
    if rest.any():
        same[rest] = _same_cropped(a[rest], b[rest])
    return same


def _same_cropped(a: _Pictures, b: _Pictures) -> Bools:
    fit = fitted(a.luma, b.luma)
    rgb, inside = warped(b.rgb, fit, RIM)
    rgb = np.clip(rgb, 0, 255)
    difference = _difference(a, _Pictures(rgb, _luma(rgb)), inside & FRAMED)
    same: Bools = (difference <= 1) & is_crop(fit, ALIGNED) & (displacement(fit) <= LARGEST_CROP)
    return same


def _difference(a: _Pictures, b: _Pictures, inside: Bools) -> Floats:
    """Largest local difference of two images, relative to what a copy may differ by; 1 is the bound."""
    brighter = gain(a.luma, b.luma, inside)[:, None, None, None]
    left, right = a.rgb * np.maximum(brighter, 1), b.rgb * np.maximum(1 / brighter, 1)
    lost_left, lost_right = _lost(left), _lost(right)
    left, right = np.minimum(left, 255), np.minimum(right, 255)
    apart = left - right  # clipping of the brightened one can only have lowered its values
    apart = np.maximum(apart - lost_left, 0) + np.minimum(apart + lost_right, 0)
    apart *= inside[:, None]
    (luma, chroma), (luma_l, chroma_l), (luma_r, chroma_r) = (_opponents(plane) for plane in (apart, left, right))
    busy = np.minimum(_range(luma_l), _range(luma_r))
    in_luma = np.abs(_mean_of_four(luma)) / (NOISE + BUSY * _mean_of_four(busy))
    colourful = np.minimum(_length(_range(chroma_l)), _length(_range(chroma_r)))
    by_cell: Floats = _length(chroma) / (NOISE + BUSY * colourful)
    in_chroma = _mean_of_four(by_cell.repeat(2, axis=1).repeat(2, axis=2))
    worst: Floats = np.sqrt(in_luma**2 + in_chroma**2).max(axis=(1, 2))
    return worst


def _lost(rgb: Floats) -> Floats:
    """Upper bound of the loss by clipping beyond ``min(rgb, 255)``: cells mix clipped and unclipped pixels."""
    excess = np.maximum(rgb - 255, 0)
    if not excess.any():
        return excess
    lost: Floats = MIXED * np.maximum(_extreme(excess, np.maximum) - excess, 0)
    return lost


def _opponents(rgb: Floats) -> tuple[Floats, Floats]:
    """Luma ``(n, 64, 64)`` and chroma ``(n, 2, 32, 32)``, the resolution of the signature."""
    luma = _luma(rgb)
    return luma, halved(np.stack([(rgb[:, 2] - luma) / 1.772, (rgb[:, 0] - luma) / 1.402], axis=1))


def _luma(rgb: Floats) -> Floats:
    luma: Floats = np.float32(0.299) * rgb[:, 0] + np.float32(0.587) * rgb[:, 1] + np.float32(0.114) * rgb[:, 2]
    return luma


def _length(chroma: Floats) -> Floats:
    length: Floats = np.sqrt((chroma**2).sum(axis=1))
    return length


def _mean_of_four(plane: Floats) -> Floats:
    """Means of all 2x2 neighbourhoods: one row and one column fewer."""
    mean: Floats = (plane[:, 1:, 1:] + plane[:, :-1, 1:] + plane[:, 1:, :-1] + plane[:, :-1, :-1]) / np.float32(4)
    return mean


def _range(plane: Floats) -> Floats:
    """Maximum minus minimum of each cell's 3x3 neighbourhood."""
    wide: Floats = _extreme(plane, np.maximum) - _extreme(plane, np.minimum)
    return wide


def _extreme(plane: Floats, pick: np.ufunc) -> Floats:
    """Maximum or minimum of each cell's 3x3 neighbourhood, ``(..., rows, columns)``."""
    out = plane.copy()
    pick(out[..., 1:, :], plane[..., :-1, :], out=out[..., 1:, :])
    pick(out[..., :-1, :], plane[..., 1:, :], out=out[..., :-1, :])
    tall = out.copy()
    pick(out[..., 1:], tall[..., :-1], out=out[..., 1:])
    pick(out[..., :-1], tall[..., 1:], out=out[..., :-1])
    return out


def _pictures(signatures: Signatures) -> _Pictures:
    """RGB from the signatures' luma and chroma, with chroma upsampled linearly."""
    values = signatures.astype(np.float32)
    luma = values[:, : LUMA**2].reshape(-1, LUMA, LUMA)
    chroma = values[:, LUMA**2 :].reshape(-1, 2, CHROMA, CHROMA) - np.float32(128)
    blue, red = (BETWEEN @ chroma[:, k] @ BETWEEN.T for k in (0, 1))
    channels = luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue
    rgb: Floats = np.stack(channels, axis=1).astype(np.float32)
    return _Pictures(rgb, luma)


def _between() -> Floats:
    """Linear upsampling matrix ``(64, 32)`` from chroma to luma cells. Rows sum to 1."""
    at = (np.arange(LUMA) + 0.5) * CHROMA / LUMA - 0.5
    weights = np.clip(1 - np.abs(at[:, None] - np.arange(CHROMA)), 0, None)
    out: Floats = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return out


BETWEEN = _between()
FRAMED = np.pad(np.ones((LUMA - 2 * RIM, LUMA - 2 * RIM), dtype=bool), RIM)
