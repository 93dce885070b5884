"""All pairs of vectors whose cosine reaches a bound, with faiss and in bounded memory.

Up to :data:`EXACT_UP_TO` vectors each is compared with every other, block by block: exact. Beyond, each goes to the
:data:`CELLS_EACH` nearest of many centroids and is compared with those that share one with it. Near vectors mostly do
(docs/benchmarks.md says how many); a pair that does not is missed, and none is invented: what faiss proposes is decided
in double precision, from the vectors as they were stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import BadInput
from .near_hashes import Indices

Vectors = npt.NDArray[np.float16]  # (n, width), of any length but 0
Floats = npt.NDArray[np.float32]

EXACT_UP_TO = 200_000
BLOCK = 4096  # vectors compared with as many others in one go: at most 16 million pairs, some 200 MB
PER_CELL = 1000  # vectors on average for each centroid
CELLS_EACH = 3
_SAMPLE = 64  # vectors per centroid that the centroids are learnt from
_ROUNDING = 1e-3  # what single precision may take from a cosine
_LAST_BITS = 1e-9  # and double precision: a vector's cosine with itself is 1


def require_faiss() -> Any:
    """The module. Raises BadInput, with the mend, where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        text = f"--embeddings needs faiss, which cannot be imported ({error})"
        raise BadInput(f"{text}; install it with: pip install 'capipe[dedup]'") from None
    return faiss


def near_vectors(vectors: Vectors, cosine: float, exact_up_to: int = EXACT_UP_TO) -> Iterator[tuple[Indices, Indices]]:
    """Blocks of pairs ``i < j``, enough of them to connect all that are connected by cosines of ``cosine`` or more.

    Of three that are all near each other two pairs will do: a thousand alike are not half a million pairs.
    """
    faiss = require_faiss()
    if len(vectors) <= exact_up_to:
        yield from _all_with_all(faiss, vectors, np.arange(len(vectors)), cosine)
        return
    for cell in _cells(faiss, vectors):
        yield from _all_with_all(faiss, vectors, cell, cosine)


def _all_with_all(faiss: Any, vectors: Vectors, rows: Indices, cosine: float) -> Iterator[tuple[Indices, Indices]]:
    parts = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    for number, part in enumerate(parts):
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(_unit(vectors[part]))
        for other in parts[number:]:
            limits, _, found = index.range_search(_unit(vectors[other]), cosine - _ROUNDING)
            i, j = part[found], np.repeat(other, np.diff(limits.astype(np.int64)))
            i, j = spanning(*_decided(vectors, i[i < j], j[i < j], cosine))
            if len(i):
                yield i, j


def _decided(vectors: Vectors, i: Indices, j: Indices, cosine: float) -> tuple[Indices, Indices]:
    """The pairs that do reach ``cosine``."""
    near = np.zeros(len(i), dtype=bool)
    for start in range(0, len(i), BLOCK):
        part = slice(start, start + BLOCK)
        a, b = (vectors[k[part]].astype(np.float64) for k in (i, j))
        lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
        near[part] = (a * b).sum(axis=1) >= (cosine - _LAST_BITS) * lengths
    return i[near], j[near]


def spanning(i: Indices, j: Indices) -> tuple[Indices, Indices]:
    """Pairs that connect what ``i < j`` connect, at most one for each index."""
    if not len(i):
        return i, j
    nodes, ends = np.unique(np.concatenate([i, j]), return_inverse=True)
    left, right = ends[: len(i)], ends[len(i) :]
    root = np.arange(len(nodes))
    while True:
        before = root.copy()
        np.minimum.at(root, right, root[left])
        np.minimum.at(root, left, root[right])
        root = root[root]
        if (root == before).all():
            break
    joined = np.flatnonzero(root != np.arange(len(nodes)))
    return nodes[root[joined]], nodes[joined]


def _cells(faiss: Any, vectors: Vectors) -> Iterator[Indices]:
    """The vectors, rising, that are near each centroid."""
    count, width = vectors.shape
    cells = max(1, count // PER_CELL)
    chosen = np.linspace(0, count - 1, min(count, _SAMPLE * cells)).astype(
        np.int64
    )  # the order is that of uids: random
    trained = faiss.Kmeans(width, cells, niter=10, seed=0, spherical=True, min_points_per_centroid=1)
    trained.train(_unit(vectors[chosen]))
    index = faiss.IndexFlatIP(width)
    index.add(trained.centroids)
    each = min(CELLS_EACH, cells)
    nearest = np.empty((count, each), dtype=np.int32)
    for start in range(0, count, BLOCK):
        nearest[start : start + BLOCK] = index.search(_unit(vectors[start : start + BLOCK]), each)[1]
    order = np.argsort(nearest.ravel(), kind="stable")
    ends = np.searchsorted(nearest.ravel()[order], np.arange(cells + 1))
    for low, high in pairwise(ends.tolist()):
        yield order[low:high] // each


def _unit(vectors: Vectors) -> Floats:
    single = vectors.astype(np.float32)
    unit: Floats = single / np.linalg.norm(single, axis=1, keepdims=True)
    return unit
