"""Confirmation of duplicate pairs by signature, as by :mod:`.slow_confirm` and several times faster.

The judgement is that of the slow twin, which says what it means: the same local differences, in arithmetic for small
batches that stay in the processor's cache, and less of it. Chroma is compared where luma agrees, and only where the fit
of a pair is that of a crop is the pair compared in its new place. Where rounding could decide, the slow twin does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Bools, Floats
from ..perceptual_hash import CHROMA, LUMA, Signatures
from .registration import fitted, gain, halved, warped
from .slow_confirm import ALIGNED, BETWEEN, BUSY, FRAMED, HOPELESS, LARGEST_CROP, MIXED, NOISE, RIM, ordered
from .slow_confirm import same_picture as judged_slowly
from .slow_registration import displacement, is_crop

_PAIRS = 32  # per batch: some 1.5 MB for all channels of a side
# glibc returns freed memory above a threshold to the system, and faults it in again page by page: a third of the time.
# The threshold follows the largest block that was freed, up to this size.
_KEPT_HEAP = 31 << 20
_UNCLEAR = np.float32(1e-3)  # of a bound of 1: nearer ones are judged by the slow twin
_UNCLEAR_PLACE = 1e-4  # fraction of a side
_UNCLEAR_START = 1e-4  # relative distance of the errors of two starts
_LARGEST_MEAN = float(NOISE + BUSY * 255)  # levels; no pair with a larger mean difference is the same picture


@dataclass(frozen=True)
class _Judged:
    """``same``, and where rounding could change it, ``(n,)`` each."""

    same: Bools
    unclear: Bools


def same_picture(a: Signatures, b: Signatures) -> Bools:
    """True for pairs ``(a[i], b[i])`` that show the same image, ``(n,)``. Symmetric."""
    np.empty(_KEPT_HEAP, dtype=np.uint8)  # freed at once
    a, b = ordered(a, b)
    same = np.zeros(len(a), dtype=bool)
    for start in range(0, len(a), _PAIRS):
        part = slice(start, start + _PAIRS)
        judged = _same(_Pictures.of(a[part]), _Pictures.of(b[part]))
        same[part] = judged.same
        if judged.unclear.any():
            which = start + np.flatnonzero(judged.unclear)
            same[which] = judged_slowly(a[which], b[which])
    return same


@dataclass(frozen=True)
class _Pictures:
    """RGB cells ``(n, 3, 64, 64)`` and their luma ``(n, 64, 64)``."""

    rgb: Floats
    luma: Floats

    @classmethod
    def of(cls, signatures: Signatures) -> _Pictures:
        """RGB from the signatures' luma and chroma, with chroma upsampled linearly."""
        values = signatures.astype(np.float32)
        luma = values[:, : LUMA**2].reshape(-1, LUMA, LUMA)
        chroma = values[:, LUMA**2 :].reshape(-1, 2, CHROMA, CHROMA)
        chroma -= 128
        upsampled = BETWEEN @ chroma @ BETWEEN.T
        blue, red = upsampled[:, 0], upsampled[:, 1]
        rgb = np.empty((len(values), 3, LUMA, LUMA), np.float32)
        np.multiply(red, np.float32(1.402), out=rgb[:, 0])
        np.multiply(blue, np.float32(-0.344136), out=rgb[:, 1])
        rgb[:, 1] -= np.float32(0.714136) * red
        np.multiply(blue, np.float32(1.772), out=rgb[:, 2])
        rgb += luma[:, None]
        return cls(rgb, luma)

    def __getitem__(self, chosen: Bools) -> _Pictures:
        return _Pictures(self.rgb[chosen], self.luma[chosen])


def _same(a: _Pictures, b: _Pictures) -> _Judged:
    difference = _difference(a, b, None)
    same: Bools = difference <= 1
    unclear: Bools = np.abs(difference - 1) < _UNCLEAR
    mean = np.abs(halved(halved(a.luma)) - halved(halved(b.luma))).reshape(len(same), -1).mean(axis=1)
    unclear |= ~same & (np.abs(mean - HOPELESS) < _UNCLEAR)
    rest = ~same & ~unclear & (mean <= HOPELESS)
    if rest.any():
        cropped = _same_cropped(a[rest], b[rest])
        same[rest], unclear[rest] = cropped.same, cropped.unclear
    return _Judged(same, unclear)


def _same_cropped(a: _Pictures, b: _Pictures) -> _Judged:
    fit, clear, error = fitted(a.luma, b.luma, _LARGEST_MEAN)
    possible = error <= _LARGEST_MEAN
    unclear: Bools = possible & (clear < _UNCLEAR_START)
    moved = displacement(fit)
    inner, outer = ((moved <= LARGEST_CROP + slack) & is_crop(fit, ALIGNED + slack) for slack in _SLACKS)
    unclear |= possible & (inner != outer)
    same = np.zeros(len(fit), dtype=bool)
    placed = possible & inner & ~unclear
    if placed.any():
        rgb, inside = warped(b.rgb[placed], fit[placed], RIM)
        np.clip(rgb, 0, 255, out=rgb)
        difference = _difference(a[placed], _Pictures(rgb, _luma(rgb)), inside * FRAMED)
        same[placed], unclear[placed] = difference <= 1, np.abs(difference - 1) < _UNCLEAR
    return _Judged(same, unclear)


_SLACKS = (-_UNCLEAR_PLACE, _UNCLEAR_PLACE)


def _difference(a: _Pictures, b: _Pictures, inside: Floats | None) -> Floats:
    """Largest local difference of two images, relative to what a copy may differ by; 1 is the bound. Above it where
    luma alone differs by more, which is then all that is compared."""
    brighter = gain(a.luma, b.luma, inside)[:, None, None, None]
    left, right = a.rgb * np.maximum(brighter, 1), b.rgb * np.maximum(1 / brighter, 1)
    clipped = _is_clipped(left) | _is_clipped(right)
    lost = (_lost(left[clipped]), _lost(right[clipped])) if clipped.any() else None
    np.minimum(left, 255, out=left)
    np.minimum(right, 255, out=right)
    apart = left - right
    if lost is not None:  # clipping of the brightened one can only have lowered its values
        some = apart[clipped]
        apart[clipped] = np.maximum(some - lost[0], 0) + np.minimum(some + lost[1], 0)
    if inside is not None:
        apart *= inside[:, None]
    lumas = [_luma(plane) for plane in (apart, left, right)]
    busy = np.minimum(_range(lumas[1]), _range(lumas[2]))
    in_luma = np.abs(_mean_of_four(lumas[0])) / (NOISE + BUSY * _mean_of_four(busy))
    worst: Floats = in_luma.reshape(len(in_luma), -1).max(axis=1)
    agree = worst <= 1 + _UNCLEAR
    if agree.any():
        planes = [(rgb[agree], luma[agree]) for rgb, luma in zip((apart, left, right), lumas, strict=True)]
        worst[agree] = _with_chroma(in_luma[agree], *(_chroma(rgb, luma) for rgb, luma in planes))
    return worst


def _with_chroma(in_luma: Floats, apart: Floats, left: Floats, right: Floats) -> Floats:
    """Largest of the luma differences ``(n, 63, 63)`` combined with those of chroma planes ``(n, 2, 32, 32)``."""
    colourful = np.minimum(_length(_range(left)), _length(_range(right)))
    by_cell = _length(apart) / (NOISE + BUSY * colourful)
    fine = np.empty((len(by_cell), LUMA, LUMA), np.float32)
    for row in (0, 1):
        for column in (0, 1):
            fine[:, row::2, column::2] = by_cell
    in_chroma = _mean_of_four(fine)
    combined = in_luma * in_luma + in_chroma * in_chroma
    worst: Floats = np.sqrt(combined.reshape(len(combined), -1).max(axis=1))
    return worst


def _is_clipped(rgb: Floats) -> Bools:
    clipped: Bools = rgb.reshape(len(rgb), -1).max(axis=1) > 255
    return clipped


def _lost(rgb: Floats) -> Floats:
    """Upper bound of the loss by clipping beyond ``min(rgb, 255)``: cells mix clipped and unclipped pixels."""
    excess = np.maximum(rgb - 255, 0)
    lost = _largest(excess)
    lost -= excess
    lost *= MIXED
    return lost


def _chroma(rgb: Floats, luma: Floats) -> Floats:
    """Chroma ``(n, 2, 32, 32)``, the resolution of the signature."""
    out = halved(rgb[:, [2, 0]])
    out -= halved(luma)[:, None]
    out *= np.array([1 / 1.772, 1 / 1.402], np.float32)[:, None, None]
    return out


def _luma(rgb: Floats) -> Floats:
    luma: Floats = np.float32(0.299) * rgb[:, 0]
    luma += np.float32(0.587) * rgb[:, 1]
    luma += np.float32(0.114) * rgb[:, 2]
    return luma


def _length(chroma: Floats) -> Floats:
    length: Floats = np.sqrt(chroma[:, 0] * chroma[:, 0] + chroma[:, 1] * chroma[:, 1])
    return length


def _mean_of_four(plane: Floats) -> Floats:
    """Means of all 2x2 neighbourhoods: one row and one column fewer."""
    tall = plane[:, 1:] + plane[:, :-1]
    mean: Floats = tall[:, :, 1:] + tall[:, :, :-1]
    mean *= np.float32(0.25)
    return mean


def _range(plane: Floats) -> Floats:
    """Maximum minus minimum of each cell's 3x3 neighbourhood."""
    wide = _largest(plane)
    wide -= _smallest(plane)
    return wide


def _largest(plane: Floats) -> Floats:
    return _extreme(plane, np.maximum)


def _smallest(plane: Floats) -> Floats:
    return _extreme(plane, np.minimum)


def _extreme(plane: Floats, pick: np.ufunc) -> Floats:
    """Maximum or minimum of each cell's 3x3 neighbourhood, ``(..., rows, columns)``."""
    out = np.empty_like(plane)
    tall = np.empty_like(plane)
    two = pick(plane[..., 1:, :], plane[..., :-1, :])
    pick(two[..., 1:, :], two[..., :-1, :], out=tall[..., 1:-1, :])
    tall[..., 0, :], tall[..., -1, :] = two[..., 0, :], two[..., -1, :]
    two = pick(tall[..., 1:], tall[..., :-1])
    pick(two[..., 1:], two[..., :-1], out=out[..., 1:-1])
    out[..., 0], out[..., -1] = two[..., 0], two[..., -1]
    return out
