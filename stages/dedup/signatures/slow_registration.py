"""Registration of image pairs that differ by a small crop or resize: Lucas-Kanade on small luma planes.

A fit is ``(n, 4)``: stretch in x, shift in x, stretch in y, shift in y, as fractions of the image; it describes the
window of the second image that the first one shows. All zero: identical frames. Gauss-Newton steps with robust weights,
so that differing content does not bias the fit; coarse cells first, then fine ones.
After Lucas and Kanade, "An Iterative Image Registration Technique" (IJCAI 1981).
"""

from __future__ import annotations

import numpy as np

from ..arrays import Bools, Floats

CLIPPED = 235.0  # luma of 255: brighter cells may be clipped, so they are ignored in brightness estimates
GAIN = 4 / 3  # largest brightness change, up or down
STARTS = (0.0, -0.04, 0.04)  # initial stretches of the search: none, and a crop of either image
COARSE_STEPS, FINE_STEPS = 5, 2
LARGEST = 0.08  # bound of a stretch or shift
LARGEST_STEP = 0.02


def fitted(a: Floats, b: Floats) -> Floats:
    """Fits ``(n, 4)`` that align lumas ``b`` ``(n, cells, cells)`` best with ``a``."""
    coarse_a, coarse_b = halved(a), halved(b)
    best: Floats = np.zeros((len(a), 4), np.float32)
    error: Floats = np.full(len(a), np.inf, np.float32)
    for stretch in STARTS:
        fit: Floats = np.zeros((len(a), 4), np.float32)
        fit[:, [0, 2]] = stretch
        for _ in range(COARSE_STEPS):
            fit = _step(coarse_a, coarse_b, fit)
        trial_error = _error(coarse_a, coarse_b, fit)
        better = trial_error < error
        best[better], error[better] = fit[better], trial_error[better]
    for _ in range(FINE_STEPS):
        best = _step(a, b, best)
    return best


def warped(planes: Floats, fit: Floats, rim: float = -0.25) -> tuple[Floats, Bools]:
    """Planes ``(n, channels, cells, cells)`` warped by the fits, interpolated by cubic convolution (Keys 1981); and a
    mask ``(n, cells, cells)`` of the cells sampled at least ``rim`` cells inside the planes' edge."""
    cells = planes.shape[-1]
    (across, at_x), (down, at_y) = (_sampling(cells, fit[:, k], fit[:, k + 1]) for k in (0, 2))
    inside_x, inside_y = ((at >= rim) & (at <= cells - 1 - rim) for at in (at_x, at_y))
    out: Floats = np.matmul(np.matmul(down[:, None], planes), across[:, None].transpose(0, 1, 3, 2))
    return out, inside_y[:, :, None] & inside_x[:, None, :]


def displacement(fit: Floats) -> Floats:
    """Largest displacement of an image edge by the fit, ``(n,)``."""
    moved: Floats = np.maximum(*(np.abs(fit[:, k]) / 2 + np.abs(fit[:, k + 1]) for k in (0, 2)))
    return moved


def is_crop(fit: Floats, slack: float) -> Bools:
    """True where one image's frame is inside the other's, within ``slack``, ``(n,)``."""
    first = np.ones(len(fit), dtype=bool)
    second = first.copy()
    for k in (0, 2):
        stretch, shift = fit[:, k] / 2, np.abs(fit[:, k + 1])
        first &= shift <= -stretch + slack
        second &= shift <= stretch + slack
    either: Bools = first | second
    return either


def gain(a: Floats, b: Floats, counted: Bools | None = None) -> Floats:
    """Factor by which to multiply lumas ``a`` ``(n, cells, cells)`` to match the brightness of ``b``, ``(n,)``."""
    clear = (a < CLIPPED) & (b < CLIPPED)
    if counted is not None:
        clear &= counted
    of_a, of_b = (np.sum(luma * luma * clear, axis=(1, 2)) + 1 for luma in (a, b))
    ratio: Floats = np.clip(np.sqrt(of_b / of_a), 1 / GAIN, GAIN)
    return ratio


def halved(plane: Floats) -> Floats:
    """Means of 2x2 cells."""
    *lead, rows, columns = plane.shape
    means: Floats = plane.reshape(*lead, rows // 2, 2, columns // 2, 2).mean(axis=(-3, -1))
    return means


def _sampling(cells: int, stretch: Floats, shift: Floats) -> tuple[Floats, Floats]:
    """Interpolation weights ``(n, cells, cells)`` along one axis, and the sampled positions ``(n, cells)``."""
    line = (np.arange(cells, dtype=np.float32) + 0.5) / cells - 0.5
    at = ((1 + stretch[:, None]) * line + shift[:, None] + 0.5) * cells - 0.5
    apart = np.abs(at[..., None] - np.arange(cells, dtype=np.float32))
    near = (1.5 * apart - 2.5) * apart**2 + 1
    far = ((-0.5 * apart + 2.5) * apart - 4) * apart + 2
    weights = np.where(apart < 1, near, np.where(apart < 2, far, 0))
    shares: Floats = (weights / np.maximum(weights.sum(-1, keepdims=True), 1e-3)).astype(np.float32)
    places: Floats = at.astype(np.float32)
    return shares, places


def _step(a: Floats, b: Floats, fit: Floats) -> Floats:
    """One Gauss-Newton step per pair."""
    count, cells, _ = a.shape
    seen, apart, counted = _compared(a, b, fit)
    typical = 3 * np.abs(apart).mean(axis=(1, 2))[:, None, None] + 2
    weight = (counted / (1 + (apart / typical) ** 2)).astype(np.float32)
    line = (np.arange(cells, dtype=np.float32) + 0.5) / cells - 0.5
    down, across = (slope * np.float32(cells) for slope in np.gradient(seen, axis=(1, 2)))
    slopes = np.stack([across * line, across, down * line[:, None], down], axis=-1).reshape(count, -1, 4)
    weighted = slopes * weight.reshape(count, -1, 1)
    curvature = weighted.transpose(0, 2, 1) @ slopes
    damping = 1e-3 * np.trace(curvature, axis1=1, axis2=2) + 100  # flat images have no gradient
    curvature += damping[:, None, None] * np.eye(4, dtype=np.float32)
    wanted = (weighted * apart.reshape(count, -1, 1)).sum(axis=1)
    step = np.linalg.solve(curvature, wanted[..., None])[..., 0]
    moved: Floats = np.clip(fit + np.clip(step, -LARGEST_STEP, LARGEST_STEP), -LARGEST, LARGEST).astype(np.float32)
    return moved


def _error(a: Floats, b: Floats, fit: Floats) -> Floats:
    """Mean absolute luma difference where both images are defined and neither is clipped, ``(n,)``."""
    _, apart, counted = _compared(a, b, fit)
    mean: Floats = (np.abs(apart) * counted).sum(axis=(1, 2)) / np.maximum(counted.sum(axis=(1, 2)), 1)
    return mean


def _compared(a: Floats, b: Floats, fit: Floats) -> tuple[Floats, Floats, Bools]:
    """``b`` warped by the fit, the difference of ``a`` from it, and the mask of comparable cells."""
    planes, inside = warped(b[:, None], fit)
    seen = planes[:, 0]
    counted = inside & (a < CLIPPED) & (seen < CLIPPED)
    return seen, gain(a, seen, counted)[:, None, None] * a - seen, counted
