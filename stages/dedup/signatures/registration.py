"""Registration as by :mod:`.slow_registration`, several times faster: the same steps in arithmetic for batches.

All starts are stepped at once, interpolation weights are polynomials of clamped distances instead of branches, and sums
over cells are products of contiguous rows. Fits differ from the slow twin's by rounding.
"""

from __future__ import annotations

import math

import numpy as np

from ..arrays import Floats
from .slow_registration import CLIPPED, COARSE_STEPS, FINE_STEPS, GAIN, LARGEST, LARGEST_STEP, STARTS

_SAME_FIT = 1e-3  # fraction of the image: starts that ended this near each other agree
_TINY = np.float32(1e-3)


def fitted(a: Floats, b: Floats, largest_error: float = math.inf) -> tuple[Floats, Floats, Floats]:
    """Fits ``(n, 4)`` that align lumas ``b`` ``(n, cells, cells)`` best with ``a``; how clearly the best start won,
    ``(n,)``: the relative distance of its error from the lowest one that led elsewhere, infinite if none did; and that
    error, in levels. Fits with more than the ``largest_error`` are not refined."""
    count, starts = len(a), len(STARTS)
    coarse_a, coarse_b = (np.tile(halved(luma), (starts, 1, 1)) for luma in (a, b))
    fits: Floats = np.zeros((starts * count, 4), np.float32)
    fits[:, [0, 2]] = np.repeat(np.array(STARTS, np.float32), count)[:, None]
    for _ in range(COARSE_STEPS):
        fits = _step(coarse_a, coarse_b, fits)
    errors = _error(coarse_a, coarse_b, fits).reshape(starts, count)
    fits = fits.reshape(starts, count, 4)
    best = errors.argmin(axis=0)
    fit, lowest = fits[best, np.arange(count)], errors.min(axis=0)
    elsewhere = np.abs(fits - fit).max(axis=2) > _SAME_FIT
    clear: Floats = (np.where(elsewhere, errors, np.inf).min(axis=0) - lowest) / np.maximum(lowest, _TINY)
    worth = lowest <= largest_error
    if worth.any():
        fine, of_a, of_b = fit[worth], a[worth], b[worth]
        for _ in range(FINE_STEPS):
            fine = _step(of_a, of_b, fine)
        fit[worth] = fine
    return fit, clear, lowest


def warped(planes: Floats, fit: Floats, rim: float = -0.25) -> tuple[Floats, Floats]:
    """Planes ``(n, channels, cells, cells)`` warped by the fits, and the mask (0 or 1) ``(n, cells, cells)`` of the
    cells sampled at least ``rim`` cells inside the planes' edge."""
    cells = planes.shape[-1]
    weights, at = _sampling(cells, fit)
    inside = ((at >= rim) & (at <= cells - 1 - rim)).astype(np.float32)
    out: Floats = np.matmul(np.matmul(weights[:, 1, None], planes), weights[:, 0, None].swapaxes(2, 3))
    mask: Floats = inside[:, 1, :, None] * inside[:, 0, None, :]
    return out, mask


def gain(a: Floats, b: Floats, counted: Floats | None = None) -> Floats:
    """Factor by which to multiply lumas ``a`` ``(n, cells, cells)`` to match the brightness of ``b``, ``(n,)``."""
    clear = ((a < CLIPPED) & (b < CLIPPED)).astype(np.float32)
    if counted is not None:
        clear *= counted
    of_a, of_b = (dot(luma * clear, luma) + 1 for luma in (a, b))
    ratio: Floats = np.clip(np.sqrt(of_b / of_a), 1 / GAIN, GAIN)
    return ratio


def dot(a: Floats, b: Floats) -> Floats:
    """Sum of products over the cells, ``(n,)``."""
    total: Floats = np.vecdot(a.reshape(len(a), -1), b.reshape(len(b), -1))
    return total


def halved(plane: Floats) -> Floats:
    """Means of 2x2 cells."""
    tall = plane[..., ::2, :] + plane[..., 1::2, :]
    means: Floats = (tall[..., ::2] + tall[..., 1::2]) * np.float32(0.25)
    return means


def _sampling(cells: int, fit: Floats) -> tuple[Floats, Floats]:
    """Interpolation weights ``(n, 2, cells, cells)`` across and down (cubic convolution), and the sampled positions
    ``(n, 2, cells)``. Each position has four weights that are not 0; those beyond the edge are cut off."""
    line = (np.arange(cells, dtype=np.float32) + np.float32(0.5)) / np.float32(cells) - np.float32(0.5)
    stretch, shift = fit[:, [0, 2], None], fit[:, [1, 3], None]
    at: Floats = ((1 + stretch) * line + shift + np.float32(0.5)) * np.float32(cells) - np.float32(0.5)
    first = np.floor(at)
    past = at - first  # fraction of a cell
    taps = np.empty((*at.shape, 4), np.float32)
    for tap, apart in enumerate((1 + past, past, 1 - past, 2 - past)):
        taps[..., tap] = _far(apart) if tap in (0, 3) else _near(apart)
    margin = _margin(cells)
    wide = np.zeros((*at.shape, cells + 2 * margin), np.float32)
    places = np.arange(at.size, dtype=np.int64) * wide.shape[-1] + (first.astype(np.int64).ravel() + margin - 1)
    wide.reshape(-1)[places[:, None] + np.arange(4)] = taps.reshape(-1, 4)
    weights = wide[..., margin : margin + cells]
    weights /= np.maximum(weights @ np.ones(cells, np.float32), _TINY)[..., None]
    return weights, at


def _margin(cells: int) -> int:
    """Cells beyond an edge at which a fit may sample, with the weights' reach."""
    return math.ceil(LARGEST * 1.5 * cells) + 3


def _near(apart: Floats) -> Floats:
    return (np.float32(1.5) * apart - np.float32(2.5)) * apart * apart + 1


def _far(apart: Floats) -> Floats:
    return ((np.float32(2.5) - np.float32(0.5) * apart) * apart - 4) * apart + 2


def _step(a: Floats, b: Floats, fit: Floats) -> Floats:
    """One Gauss-Newton step per pair."""
    count, cells, _ = a.shape
    seen, apart, counted = _compared(a, b, fit)
    typical = 3 * np.abs(apart).reshape(count, -1).mean(axis=1) + 2
    weight = apart / typical[:, None, None]
    np.multiply(weight, weight, out=weight)
    weight += 1
    np.divide(counted, weight, out=weight)
    line = (np.arange(cells, dtype=np.float32) + np.float32(0.5)) / np.float32(cells) - np.float32(0.5)
    slopes = np.empty((count, 5, cells, cells), np.float32)  # and what they are to explain
    _gradient(seen, slopes[:, 3], slopes[:, 1])
    np.multiply(slopes[:, 1], line, out=slopes[:, 0])
    np.multiply(slopes[:, 3], line[:, None], out=slopes[:, 2])
    slopes[:, 4] = apart
    weighted = (slopes[:, :4] * weight[:, None]).reshape(count, 4, -1)
    sums = np.vecdot(weighted[:, :, None], slopes.reshape(count, 1, 5, -1))
    curvature, wanted = sums[..., :4], sums[..., 4:]
    damping = np.float32(1e-3) * np.trace(curvature, axis1=1, axis2=2) + 100  # flat images have no gradient
    curvature += damping[:, None, None] * np.eye(4, dtype=np.float32)
    step = np.linalg.solve(curvature, wanted)[..., 0]
    moved: Floats = np.clip(fit + np.clip(step, -LARGEST_STEP, LARGEST_STEP), -LARGEST, LARGEST).astype(np.float32)
    return moved


def _gradient(plane: Floats, down: Floats, across: Floats) -> None:
    """Slopes per image side into ``down`` and ``across``: central differences, one-sided at the edges."""
    cells = np.float32(plane.shape[-1])
    np.subtract(plane[:, 2:], plane[:, :-2], out=down[:, 1:-1])
    down[:, 1:-1] *= cells / 2
    np.subtract(plane[:, :, 2:], plane[:, :, :-2], out=across[:, :, 1:-1])
    across[:, :, 1:-1] *= cells / 2
    for edge, inner in ((0, 1), (-1, -2)):
        sign = cells if edge == 0 else -cells
        down[:, edge] = (plane[:, inner] - plane[:, edge]) * sign
        across[:, :, edge] = (plane[:, :, inner] - plane[:, :, edge]) * sign


def _error(a: Floats, b: Floats, fit: Floats) -> Floats:
    """Mean absolute luma difference where both images are defined and neither is clipped, ``(n,)``."""
    _, apart, counted = _compared(a, b, fit)
    mean: Floats = dot(np.abs(apart), counted) / np.maximum(counted.reshape(len(a), -1).sum(axis=1), 1)
    return mean


def _compared(a: Floats, b: Floats, fit: Floats) -> tuple[Floats, Floats, Floats]:
    """``b`` warped by the fit, the difference of ``a`` from it, and the mask (0 or 1) of comparable cells."""
    planes, counted = warped(b[:, None], fit)
    seen = planes[:, 0]
    counted *= (a < CLIPPED) & (seen < CLIPPED)
    apart = gain(a, seen, counted)[:, None, None] * a
    apart -= seen
    return seen, apart, counted
