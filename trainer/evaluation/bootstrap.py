"""Bootstrap intervals for ratios of sums over images. Pure functions on numpy arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Figure = tuple[str, str, str]  # system, measure, question kind ("" for all kinds)

LEVEL = 0.95
RESAMPLES = 1000
RECALL_AT = (1, 5, 10)
_BLOCK = 4_000_000  # weights in memory at a time, so that it does not grow with images times resamples


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval and ``n``, its denominator.

    ``value``: None if ``n`` is 0; ``low``, ``high``: None with fewer than two images.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


NOTHING = Estimate(None, None, None, 0)


def found_at(rank: int) -> dict[int, bool]:
    """Whether ``rank`` (1 is the best) is among the first k, for each k of :data:`RECALL_AT`."""
    return {k: rank <= k for k in RECALL_AT}


class Ratios:
    """Collects numerators and denominators by figure and image; a figure is the ratio of their sums.

    Stored as flat arrays, 20 bytes per entry, since a large evaluation has millions of entries.
    """

    def __init__(self) -> None:
        self._entries: dict[Figure, tuple[array[int], array[float], array[float]]] = {}

    def add(self, figure: Figure, image: int, part: float, whole: float = 1.0) -> None:
        """Add numerator and denominator of image number ``image`` to ``figure``; for a mean the denominator is 1."""
        if figure not in self._entries:
            self._entries[figure] = (array("i"), array("d"), array("d"))
        images, parts, wholes = self._entries[figure]
        images.append(image)
        parts.append(part)
        wholes.append(whole)

    def sums(self, images: int) -> tuple[Array, Array]:
        """Sums of numerators and denominators, each (images, figures); figures in the order of their first entry."""
        parts = np.zeros((images, len(self._entries)))
        wholes = np.zeros_like(parts)
        for column, (where, part, whole) in enumerate(self._entries.values()):
            index = np.asarray(where)
            parts[:, column] = np.bincount(index, np.asarray(part), images)
            wholes[:, column] = np.bincount(index, np.asarray(whole), images)
        return parts, wholes

    def estimates(self, images: int, resamples: int, seed: int) -> dict[Figure, tuple[Estimate, Array]]:
        """Estimate of every figure, with bootstrap values (resamples,). All figures use the same resampled images."""
        if not self._entries:
            return {}
        parts, wholes = self.sums(images)
        draws = resampled_ratios(parts, wholes, resamples, seed)
        return {
            figure: (estimate(parts[:, column], wholes[:, column], draws[:, column]), draws[:, column])
            for column, figure in enumerate(self._entries)
        }


def estimate(parts: Array, wholes: Array, draws: Array) -> Estimate:
    """Estimate of one figure from its sums by image, both (images,), and its bootstrap values (resamples,)."""
    whole = float(wholes.sum())
    if whole == 0:
        return NOTHING
    value, n = float(parts.sum()) / whole, round(whole)
    known = draws[~np.isnan(draws)]
    if np.count_nonzero(wholes) < 2 or not known.size:
        return Estimate(value, None, None, n)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), n)


def resampled_ratios(parts: Array, wholes: Array, resamples: int, seed: int) -> Array:
    """Bootstrap values of ratios, images sampled with replacement: (resamples, figures), nan for denominator 0.

    ``parts``, ``wholes``: (images, figures). The unit is the image, since questions about one image, and answers to one
    question, are correlated (cluster bootstrap; Efron and Tibshirani 1993, chapter 8).
    """
    blocks = [
        np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
        for weights in _weights(len(parts), resamples, seed)
        for part, whole in [(weights @ parts, weights @ wholes)]
    ]
    return np.concatenate(blocks)


def two_sided_p(draws: Array) -> float | None:
    """Two-sided bootstrap p of no difference: twice the share of values beyond zero; None without values.

    1 is added to numerator and denominator, so that p is never 0 (Davison and Hinkley 1997, eq. 4.11).
    """
    known = np.round(draws[~np.isnan(draws)], 12)  # differences that should cancel to 0 do so in any order of summation
    if not known.size:
        return None
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return float(min(1.0, 2 * (1 + tail) / (1 + known.size)))


def _weights(images: int, resamples: int, seed: int) -> Iterator[Array]:
    """Number of times that each image is sampled, in blocks of (some resamples, images)."""
    rng = np.random.default_rng(seed)
    most = max(1, _BLOCK // images)
    for start in range(0, resamples, most):
        count = min(most, resamples - start)
        drawn = [np.bincount(rng.integers(0, images, images, dtype=np.int32), minlength=images) for _ in range(count)]
        yield np.stack(drawn).astype(np.float64)
