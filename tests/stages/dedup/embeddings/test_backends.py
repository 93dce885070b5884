"""faiss and torch compute the same; what is missing is said."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from capipe.errors import BadInput
from capipe.stages.dedup.embeddings.backends import FAISS, Backend, backend_of, require_faiss, unit

from ...vectors import clustered

DEVICES = [FAISS, "cpu"]


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == FAISS:
        pytest.importorskip("faiss", reason="the extra 'dedup' is not installed")
    return backend_of(request.param)


def test_near_pairs_and_centroids_are_those_of_all_products(backend: Backend) -> None:
    a, b = unit(clustered(200, 20, 32, 0.3, seed=1)), unit(clustered(500, 20, 32, 0.3, seed=1))
    products = a.astype(np.float64) @ b.T.astype(np.float64)
    row, column, similar = backend.above(a, b, 0.9)
    sure = products >= 0.9 + backend.rounding(32)
    assert set(zip(*np.nonzero(sure), strict=True)) <= set(zip(row.tolist(), column.tolist(), strict=True))
    assert (np.abs(products[row, column] - similar) <= backend.rounding(32)).all() and sure.sum() > 100
    nearest, numbers = backend.nearest(a, b, 5)
    assert np.allclose(nearest, -np.sort(-products, axis=1)[:, :5], atol=1e-5)
    assert np.allclose(np.take_along_axis(products, numbers, 1), nearest, atol=1e-5)


def test_centroids_are_those_of_separate_clusters(backend: Backend) -> None:
    vectors = unit(clustered(600, 12, 48, 0.05, seed=2))
    centroids = backend.centroids(vectors, 40)
    assert centroids.shape == (40, 48) and np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    assert (vectors @ centroids.T).max(axis=1).min() > 0.9
    assert (backend.centroids(vectors, 40) == centroids).all()
    assert len(backend.centroids(vectors[:7], 40)) == 7


def test_without_faiss_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(BadInput, match=r"needs faiss.*pip install 'capipe\[dedup\]'"):
        require_faiss()
