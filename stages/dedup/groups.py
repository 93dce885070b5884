"""Groups of duplicates: candidates from hashes, confirmed pairs joined by union-find, one keeper per group.

Pure functions of the images' contents, sorted by uid; so the order of shards and rows does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .near_hashes import Indices, near_pairs

U64 = npt.NDArray[np.uint64]


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


def candidates(contents: Contents, radius: int) -> tuple[Indices, Indices]:
    """All pairs ``i < j`` whose hashes are within ``radius``, each once, in order.

    Compares whole images with each other, and with the centres of the others, which finds cropped copies.
    """
    return _collected(
        len(contents),
        (
            (np.minimum(i, j)[i != j], np.maximum(i, j)[i != j])
            for right in (contents.phash, contents.inner)
            for i, j in near_pairs(contents.phash, right, radius)
        ),
    )


def candidates_between(contents: Contents, others: Contents, radius: int) -> tuple[Indices, Indices]:
    """All pairs of a file and one of ``others`` whose hashes are within ``radius``, each once, in order."""
    sides = ((contents.phash, others.phash), (contents.phash, others.inner), (contents.inner, others.phash))
    return _collected(len(others), (pair for left, right in sides for pair in near_pairs(left, right, radius)))


def _collected(width: int, blocks: Iterator[tuple[Indices, Indices]]) -> tuple[Indices, Indices]:
    codes = [np.unique(i * width + j) for i, j in blocks]
    if not codes:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    distinct = np.unique(np.concatenate(codes))
    return distinct // width, distinct % width


def connected(count: int, left: Indices, right: Indices) -> Indices:
    """Connected components (union-find) of ``count`` files under pairs ``(left[k], right[k])``: root of each file."""
    parents = list(range(count))

    def root(node: int) -> int:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for i, j in zip(left.tolist(), right.tolist(), strict=True):
        a, b = root(i), root(j)
        parents[max(a, b)] = min(a, b)
    return np.fromiter((root(node) for node in range(count)), dtype=np.int64, count=count)


def keepers(contents: Contents, groups: Indices) -> Indices:
    """For each file the keeper of its group, ``(n,)``: most pixels, then lowest uid."""
    order = np.lexsort((np.arange(len(groups)), -contents.pixels, groups))
    ordered = groups[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    kept = np.empty(len(order), dtype=np.int64)
    kept[order] = order[starts][np.cumsum(starts) - 1]
    return kept
