"""Dense linear algebra of the search: faiss on CPUs, torch on GPUs.

Both compute the same in single precision. What they propose is verified in double precision, so a backend decides no
pair; which pairs are proposed depends on the cells, whose centroids may differ in their last bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ....errors import BadInput
from ..arrays import Floats, Indices
from .forest import Vectors

FAISS = "faiss"  # any other device is torch's: cpu, cuda:0
_ITERATIONS = 10
_BLOCK = 8192  # vectors per block that a GPU multiplies
_TF32 = 2e-3  # error of a cosine from factors with 10 bits of mantissa


class Backend(Protocol):
    """``rounding(width)``: largest error of a cosine that it computes."""

    def rounding(self, width: int) -> float: ...

    def centroids(self, vectors: Floats, count: int) -> Floats:
        """Spherical k-means of unit vectors: ``count`` unit centroids, fewer where there are fewer vectors."""
        ...

    def nearest(self, vectors: Floats, centroids: Floats, count: int) -> tuple[Floats, Indices]:
        """Cosines and numbers of the ``count`` nearest centroids of each unit vector, nearest first."""
        ...

    def above(self, queries: Floats, others: Floats, bound: float) -> tuple[Indices, Indices, Floats]:
        """Pairs ``(query, other)`` of unit vectors whose cosine reaches ``bound``, and the cosines."""
        ...


def unit(vectors: Vectors) -> Floats:
    """The vectors in single precision, at length 1."""
    single = vectors.astype(np.float32)
    lengths: Floats = np.linalg.norm(single, axis=1, keepdims=True)
    return single / lengths


def require_faiss() -> Any:
    """Import faiss. Raises BadInput, with install instructions, if it is missing."""
    try:
        import faiss
    except ImportError as error:
        text = f"--embeddings needs faiss, which cannot be imported ({error})"
        raise BadInput(f"{text}; install it with: pip install 'capipe[dedup]'") from None
    return faiss


@cache
def backend_of(device: str) -> Backend:
    """The backend of a device: :data:`FAISS`, or a device of torch."""
    return FaissBackend() if device == FAISS else TorchBackend(device)


def _single_precision(width: int) -> float:
    """Bound of the error of an inner product of unit vectors in single precision."""
    return (width + 16) * 2.0**-23


class FaissBackend:
    """faiss, with one thread: workers are processes, and a result must not depend on the number of cores."""

    def __init__(self) -> None:
        self._faiss = require_faiss()
        self._faiss.omp_set_num_threads(1)

    def rounding(self, width: int) -> float:
        return _single_precision(width)

    def centroids(self, vectors: Floats, count: int) -> Floats:
        options = {"niter": _ITERATIONS, "seed": 0, "spherical": True, "min_points_per_centroid": 1}
        most = len(vectors) // max(1, min(count, len(vectors))) + 1  # all vectors are used
        trained = self._faiss.Kmeans(
            vectors.shape[1], min(count, len(vectors)), max_points_per_centroid=most, **options
        )
        trained.train(vectors)
        centroids: Floats = trained.centroids
        return centroids

    def nearest(self, vectors: Floats, centroids: Floats, count: int) -> tuple[Floats, Indices]:
        similar, numbers = self._index(centroids).search(vectors, count)
        return similar, numbers

    def above(self, queries: Floats, others: Floats, bound: float) -> tuple[Indices, Indices, Floats]:
        limits, similar, numbers = self._index(others).range_search(queries, bound)
        return np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), numbers, similar

    def _index(self, vectors: Floats) -> Any:
        index = self._faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors))
        return index


class TorchBackend:
    """torch on a GPU (or on a CPU, where it is the slow twin of faiss)."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device = torch, torch.device(device)
        if self._device.type == "cuda":  # TF32, or the same in bfloat16 parts: what it proposes is verified
            torch.set_float32_matmul_precision("high")

    def rounding(self, width: int) -> float:
        return _single_precision(width) + (_TF32 if self._device.type == "cuda" else 0.0)

    def centroids(self, vectors: Floats, count: int) -> Floats:
        torch, data = self._torch, self._put(vectors)
        count = min(count, len(vectors))
        centroids = data[torch.linspace(0, len(data) - 1, count, dtype=torch.float64).long()]
        for _ in range(_ITERATIONS):
            sums = torch.zeros_like(centroids)
            for block in data.split(_BLOCK // 8):
                nearest = (block @ centroids.T).argmax(dim=1)
                # A product, since a scattered sum on a GPU adds in any order.
                sums += torch.nn.functional.one_hot(nearest, count).T.to(block.dtype) @ block
            lengths = sums.norm(dim=1, keepdim=True)
            centroids = torch.where(lengths > 0, sums / lengths.clamp_min(1e-12), centroids)  # empty cells stay
        return self._get(centroids)

    def nearest(self, vectors: Floats, centroids: Floats, count: int) -> tuple[Floats, Indices]:
        there = self._put(centroids)
        found = [(block @ there.T).topk(count, dim=1) for block in self._put(vectors).split(_BLOCK)]
        similar, numbers = (self._torch.cat([part[k] for part in found]) for k in (0, 1))
        return self._get(similar), self._get(numbers)

    def above(self, queries: Floats, others: Floats, bound: float) -> tuple[Indices, Indices, Floats]:
        similar = self._put(queries) @ self._put(others).T
        row, column = self._torch.nonzero(similar >= bound, as_tuple=True)
        return self._get(row), self._get(column), self._get(similar[row, column])

    def _put(self, array: Floats) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _get(self, tensor: Any) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = tensor.cpu().numpy()
        return array
