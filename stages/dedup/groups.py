"""Groups of duplicates: pairs joined by union-find, one keeper per group.

Pure functions of the images' contents, sorted by uid; so the order of shards and rows does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .arrays import U64, Indices, Numbers


@dataclass(frozen=True)
class Contents:
    """Distinct image files sorted by uid, with their pixel counts and hashes. All arrays ``(n,)``; 48 bytes a file.

    ``uids``: 16 bytes; ``pixels``: width times height; ``phash``, ``inner``, ``look``: see :mod:`.perceptual_hash`.
    """

    uids: npt.NDArray[np.bytes_]
    pixels: Indices
    phash: U64
    inner: U64
    look: U64

    def __len__(self) -> int:
        return len(self.uids)

    def take(self, chosen: Indices) -> Contents:
        """Subset, in the order of ``chosen``."""
        hashes = self.phash[chosen], self.inner[chosen], self.look[chosen]
        return Contents(self.uids[chosen], self.pixels[chosen], *hashes)


def lookalikes(contents: Contents) -> Indices:
    """For each file the first one with identical hashes and signature, ``(n,)``: these need no search."""
    order = np.lexsort((contents.look, contents.inner, contents.phash))
    ordered = contents.take(order)
    starts = np.ones(len(order), dtype=bool)
    if len(order):
        starts[1:] = (
            (ordered.phash[1:] != ordered.phash[:-1])
            | (ordered.inner[1:] != ordered.inner[:-1])
            | (ordered.look[1:] != ordered.look[:-1])
        )
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]  # lexsort is stable: the first of a run is the lowest
    return first


class Components:
    """Connected components of ``count`` nodes, joined block by block (union-find on arrays). A component's root is its
    lowest node."""

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count, dtype=np.int64)

    def join(self, left: Indices, right: Indices) -> None:
        """Join nodes ``left[k]`` and ``right[k]``."""
        while True:
            a, b = self.roots(left), self.roots(right)
            apart = a != b
            if not apart.any():
                return
            left, right = np.minimum(a[apart], b[apart]), np.maximum(a[apart], b[apart])
            np.minimum.at(self._parents, right, left)
            ends = np.unique(right)
            while True:  # each step halves the way to the root
                above = self._parents[self._parents[ends]]
                if (above == self._parents[ends]).all():
                    break
                self._parents[ends] = above

    def roots(self, nodes: Indices) -> Indices:
        """The root of each node's component."""
        roots = self._parents[nodes]
        while True:
            above = self._parents[roots]
            if (above == roots).all():
                break
            roots = above
        self._parents[nodes] = roots
        return roots


def connected(count: int, left: Indices, right: Indices) -> Indices:
    """Connected components of ``count`` files under pairs ``(left[k], right[k])``: the lowest file of each one's."""
    components = Components(count)
    components.join(left, right)
    return components.roots(np.arange(count))


def keepers(contents: Contents, groups: Indices, preference: Numbers | None = None) -> Indices:
    """For each file the keeper of its group, ``(n,)``: highest ``preference`` (``(n,)``; NaN is the lowest), then most
    pixels, then lowest uid."""
    disliked = np.zeros(len(groups)) if preference is None else -preference  # NaN is sorted last
    order = np.lexsort((np.arange(len(groups)), -contents.pixels, disliked, groups))
    ordered = groups[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    kept = np.empty(len(order), dtype=np.int64)
    kept[order] = order[starts][np.cumsum(starts) - 1]
    return kept
