"""Figures that are ratios of sums over images, with bootstrap intervals. Pure mathematics on numpy arrays."""

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
_BLOCK = 4_000_000  # weights held at a time, so that memory does not grow with images times resamples


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95 % interval and ``n``, what it is a share of or a mean over.

    ``value`` is None where ``n`` is 0; ``low`` and ``high`` are None where fewer than two images are behind it.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


NOTHING = Estimate(None, None, None, 0)


def found_at(rank: int) -> dict[int, bool]:
    """Whether what was found at ``rank`` (1 is the best) is among the first k, for each k of :data:`RECALL_AT`."""
    return {k: rank <= k for k in RECALL_AT}


class Ratios:
    """Collects a part and a whole by figure and image; a figure is the sum of its parts over the sum of its wholes.

    Kept as flat arrays, 20 bytes an entry, since there are millions of entries in a large evaluation.
    """

    def __init__(self) -> None:
        self._entries: dict[Figure, tuple[array[int], array[float], array[float]]] = {}

    def add(self, figure: Figure, image: int, part: float, whole: float = 1.0) -> None:
        """Add to what image number ``image`` contributes to ``figure``; a mean has a whole of 1 for each term."""
        if figure not in self._entries:
            self._entries[figure] = (array("i"), array("d"), array("d"))
        images, parts, wholes = self._entries[figure]
        images.append(image)
        parts.append(part)
        wholes.append(whole)

    def sums(self, images: int) -> tuple[Array, Array]:
        """Parts and wholes, each (images, figures), the figures in the order of their first entry."""
        parts = np.zeros((images, len(self._entries)))
        wholes = np.zeros_like(parts)
        for column, (where, part, whole) in enumerate(self._entries.values()):
            index = np.asarray(where)
            parts[:, column] = np.bincount(index, np.asarray(part), images)
            wholes[:, column] = np.bincount(index, np.asarray(whole), images)
        return parts, wholes

    def estimates(self, images: int, resamples: int, seed: int) -> dict[Figure, tuple[Estimate, Array]]:
        """Every figure with its draws (resamples,). All figures see the same resampled images."""
        if not self._entries:
            return {}
        parts, wholes = self.sums(images)
        draws = resampled_ratios(parts, wholes, resamples, seed)
        return {
            figure: (estimate(parts[:, column], wholes[:, column], draws[:, column]), draws[:, column])
            for column, figure in enumerate(self._entries)
        }


def estimate(parts: Array, wholes: Array, draws: Array) -> Estimate:
    """One figure from its sums by image, both (images,), and the figure in each resample (resamples,)."""
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
    """Ratios of sums in samples of as many images, drawn with replacement: (resamples, figures), nan over no whole.

    ``parts`` and ``wholes`` are (images, figures). The unit is the image, since questions about one image, and answers
    to one question, rise and fall together (the cluster bootstrap; Efron and Tibshirani 1993, chapter 8).
    """
    blocks = [
        np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
        for weights in _weights(len(parts), resamples, seed)
        for part, whole in [(weights @ parts, weights @ wholes)]
    ]
    return np.concatenate(blocks)


def two_sided_p(draws: Array) -> float | None:
    """The bootstrap p of no difference: twice the share of draws on the far side of zero; None where there are none.

    One is added above and below, so that no finite number of draws gives a p of 0 (Davison and Hinkley 1997, eq. 4.11).
    """
    known = np.round(draws[~np.isnan(draws)], 12)  # what should cancel to 0 does, whatever the order of the sums
    if not known.size:
        return None
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return float(min(1.0, 2 * (1 + tail) / (1 + known.size)))


def _weights(images: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each image is drawn, in blocks of (some resamples, images)."""
    rng = np.random.default_rng(seed)
    most = max(1, _BLOCK // images)
    for start in range(0, resamples, most):
        count = min(most, resamples - start)
        drawn = [np.bincount(rng.integers(0, images, images, dtype=np.int32), minlength=images) for _ in range(count)]
        yield np.stack(drawn).astype(np.float64)
