"""All pairs of vectors whose cosine reaches a bound, with faiss and in bounded memory.

Up to :data:`EXACT_UP_TO` vectors: brute force, block by block, exact. Beyond: each vector is assigned to its
:data:`CELLS_EACH` nearest centroids and compared with those that share one. Near vectors mostly do (docs/benchmarks.md
has the recall); a pair that does not is missed. There are no false positives: candidates from faiss are verified in
double precision, from the stored vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import BadInput
from .arrays import Indices

Vectors = npt.NDArray[np.float16]  # (n, width), of any non-zero length
Floats = npt.NDArray[np.float32]

EXACT_UP_TO = 200_000
BLOCK = 4096  # vectors per block, compared block by block: at most 16 million pairs, some 200 MB
PER_CELL = 1000  # average vectors per centroid
CELLS_EACH = 3
_SAMPLE = 64  # training vectors per centroid
_ROUNDING = 1e-3  # rounding error of a cosine in single precision
_LAST_BITS = 1e-9  # and in double precision: a vector's cosine with itself is 1


def require_faiss() -> Any:
    """Import faiss. Raises BadInput, with install instructions, if it is missing."""
    try:
        import faiss
    except ImportError as error:
        text = f"--embeddings needs faiss, which cannot be imported ({error})"
        raise BadInput(f"{text}; install it with: pip install 'capipe[dedup]'") from None
    return faiss


def near_vectors(vectors: Vectors, cosine: float, exact_up_to: int = EXACT_UP_TO) -> Iterator[tuple[Indices, Indices]]:
    """Blocks of pairs ``i < j``, enough of them to connect all vectors with cosines of at least ``cosine``.

    Two pairs are enough for three mutually near vectors: a thousand similar ones do not yield half a million pairs.
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
            limits, _, hits = index.range_search(_unit(vectors[other]), cosine - _ROUNDING)
            i, j = part[hits], np.repeat(other, np.diff(limits.astype(np.int64)))
            i, j = spanning(*_decided(vectors, i[i < j], j[i < j], cosine))
            if len(i):
                yield i, j


def _decided(vectors: Vectors, i: Indices, j: Indices, cosine: float) -> tuple[Indices, Indices]:
    """Pairs that reach ``cosine`` in double precision."""
    near = np.zeros(len(i), dtype=bool)
    for start in range(0, len(i), BLOCK):
        part = slice(start, start + BLOCK)
        a, b = (vectors[k[part]].astype(np.float64) for k in (i, j))
        lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
        near[part] = (a * b).sum(axis=1) >= (cosine - _LAST_BITS) * lengths
    return i[near], j[near]


def spanning(i: Indices, j: Indices) -> tuple[Indices, Indices]:
    """Spanning forest of pairs ``i < j``: the same components, at most one pair per index."""
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
    """Sorted vector indices assigned to each centroid."""
    count, width = vectors.shape
    cells = max(1, count // PER_CELL)
    chosen = np.linspace(0, count - 1, min(count, _SAMPLE * cells)).astype(np.int64)  # sorted by uid, hence random
    trained = faiss.Kmeans(width, cells, niter=10, seed=0, spherical=True, min_points_per_centroid=1)
    trained.train(_unit(vectors[chosen]))
    index = faiss.IndexFlatIP(width)
    index.add(trained.centroids)
    per_vector = min(CELLS_EACH, cells)
    nearest = np.empty((count, per_vector), dtype=np.int32)
    for start in range(0, count, BLOCK):
        nearest[start : start + BLOCK] = index.search(_unit(vectors[start : start + BLOCK]), per_vector)[1]
    order = np.argsort(nearest.ravel(), kind="stable")
    ends = np.searchsorted(nearest.ravel()[order], np.arange(cells + 1))
    for low, high in pairwise(ends.tolist()):
        yield order[low:high] // per_vector


def _unit(vectors: Vectors) -> Floats:
    single = vectors.astype(np.float32)
    unit: Floats = single / np.linalg.norm(single, axis=1, keepdims=True)
    return unit
