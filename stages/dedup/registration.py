"""Where one picture lies in another, if one was cropped or resized a little: Lucas and Kanade's method on small lumas.

A fit is ``(n, 4)``: stretch in x, shift in x, stretch in y, shift in y, in shares of the picture, of the second
picture's window that the first one shows. All zero: they lie on each other. Gauss-Newton steps with robust weights, for
what differs between two pictures must not pull on what they share; coarse cells first, then fine ones.
After Lucas and Kanade, "An Iterative Image Registration Technique" (IJCAI 1981).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

CLIPPED = 235.0  # luma of 255: brighter cells may have been cut off, and say nothing of a change in brightness
GAIN = 4 / 3  # the largest change in brightness, up or down
_STARTS = (0.0, -0.04, 0.04)  # stretches that the search begins with: none, and either picture a crop
_COARSE_STEPS, _FINE_STEPS = 5, 2
_LARGEST = 0.08  # of a stretch or shift


def fitted(a: Floats, b: Floats) -> Floats:
    """The fits ``(n, 4)`` under which lumas ``b`` ``(n, cells, cells)`` agree best with ``a``."""
    coarse_a, coarse_b = halved(a), halved(b)
    best: Floats = np.zeros((len(a), 4), np.float32)
    error: Floats = np.full(len(a), np.inf, np.float32)
    for stretch in _STARTS:
        fit: Floats = np.zeros((len(a), 4), np.float32)
        fit[:, [0, 2]] = stretch
        for _ in range(_COARSE_STEPS):
            fit = _step(coarse_a, coarse_b, fit)
        found = _error(coarse_a, coarse_b, fit)
        better = found < error
        best[better], error[better] = fit[better], found[better]
    for _ in range(_FINE_STEPS):
        best = _step(a, b, best)
    return best


def warped(planes: Floats, fit: Floats, rim: float = -0.25) -> tuple[Floats, Bools]:
    """Planes ``(n, channels, cells, cells)`` through the fits' windows, between cells by cubic convolution (Keys 1981);
    and which cells were read ``rim`` cells or more inside the planes' edge, ``(n, cells, cells)``."""
    cells = planes.shape[-1]
    (across, at_x), (down, at_y) = (_sampling(cells, fit[:, k], fit[:, k + 1]) for k in (0, 2))
    inside_x, inside_y = ((at >= rim) & (at <= cells - 1 - rim) for at in (at_x, at_y))
    out: Floats = np.matmul(np.matmul(down[:, None], planes), across[:, None].transpose(0, 1, 3, 2))
    return out, inside_y[:, :, None] & inside_x[:, None, :]


def displacement(fit: Floats) -> Floats:
    """How far the fit moves the edge that it moves most, ``(n,)``."""
    moved: Floats = np.maximum(*(np.abs(fit[:, k]) / 2 + np.abs(fit[:, k + 1]) for k in (0, 2)))
    return moved


def is_crop(fit: Floats, slack: float) -> Bools:
    """Whether the one picture's frame lies within the other's, give or take ``slack``, ``(n,)``."""
    first = np.ones(len(fit), dtype=bool)
    second = first.copy()
    for k in (0, 2):
        stretch, shift = fit[:, k] / 2, np.abs(fit[:, k + 1])
        first &= shift <= -stretch + slack
        second &= shift <= stretch + slack
    either: Bools = first | second
    return either


def gain(a: Floats, b: Floats, counted: Bools | None = None) -> Floats:
    """What lumas ``a`` ``(n, cells, cells)`` are to be multiplied by to be as bright as ``b``, ``(n,)``."""
    clear = (a < CLIPPED) & (b < CLIPPED)
    if counted is not None:
        clear &= counted
    of_a, of_b = (np.sum(each * each * clear, axis=(1, 2)) + 1 for each in (a, b))
    ratio: Floats = np.clip(np.sqrt(of_b / of_a), 1 / GAIN, GAIN)
    return ratio


def halved(plane: Floats) -> Floats:
    """Means of 2x2 cells."""
    *lead, rows, columns = plane.shape
    means: Floats = plane.reshape(*lead, rows // 2, 2, columns // 2, 2).mean(axis=(-3, -1))
    return means


def _sampling(cells: int, stretch: Floats, shift: Floats) -> tuple[Floats, Floats]:
    """Weights ``(n, cells, cells)`` that read a line of cells at the fit's places, and the places, ``(n, cells)``."""
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
    """One Gauss-Newton step for each pair."""
    count, cells, _ = a.shape
    seen, apart, counted = _compared(a, b, fit)
    typical = 3 * np.abs(apart).mean(axis=(1, 2))[:, None, None] + 2
    weight = (counted / (1 + (apart / typical) ** 2)).astype(np.float32)
    line = (np.arange(cells, dtype=np.float32) + 0.5) / cells - 0.5
    down, across = (each * np.float32(cells) for each in np.gradient(seen, axis=(1, 2)))
    slopes = np.stack([across * line, across, down * line[:, None], down], axis=-1).reshape(count, -1, 4)
    weighted = slopes * weight.reshape(count, -1, 1)
    curvature = weighted.transpose(0, 2, 1) @ slopes
    damping = 1e-3 * np.trace(curvature, axis1=1, axis2=2) + 100  # flat pictures have no slope to go by
    curvature += damping[:, None, None] * np.eye(4, dtype=np.float32)
    wanted = (weighted * apart.reshape(count, -1, 1)).sum(axis=1)
    step = np.linalg.solve(curvature, wanted[..., None])[..., 0]
    moved: Floats = np.clip(fit + np.clip(step, -0.02, 0.02), -_LARGEST, _LARGEST).astype(np.float32)
    return moved


def _error(a: Floats, b: Floats, fit: Floats) -> Floats:
    """Mean difference of luma where both pictures are known and neither is clipped, ``(n,)``."""
    _, apart, counted = _compared(a, b, fit)
    mean: Floats = (np.abs(apart) * counted).sum(axis=(1, 2)) / np.maximum(counted.sum(axis=(1, 2)), 1)
    return mean


def _compared(a: Floats, b: Floats, fit: Floats) -> tuple[Floats, Floats, Bools]:
    """``b`` as the fit sees it, what ``a`` has more than that, and the cells that can be compared."""
    planes, inside = warped(b[:, None], fit)
    seen = planes[:, 0]
    counted = inside & (a < CLIPPED) & (seen < CLIPPED)
    return seen, gain(a, seen, counted)[:, None, None] * a - seen, counted
