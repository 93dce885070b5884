"""Near vectors by faiss against every pair compared in numpy."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from capipe.errors import BadInput
from capipe.stages.dedup import cosine as module
from capipe.stages.dedup.arrays import Indices
from capipe.stages.dedup.cosine import Vectors, near_vectors, require_faiss, spanning
from capipe.stages.dedup.groups import connected


def every_pair(vectors: Vectors, cosine: float) -> tuple[Indices, Indices]:
    """The slow twin: all pairs ``i < j`` that reach ``cosine``, in double precision."""
    full = vectors.astype(np.float64)
    norms = np.sqrt((full**2).sum(axis=1))
    i, j = np.nonzero(np.triu(full @ full.T >= (cosine - 1e-9) * np.outer(norms, norms), 1))
    return i, j


def groups(count: int, pairs: list[tuple[Indices, Indices]]) -> Indices:
    none = np.empty(0, dtype=np.int64)
    return connected(count, *(np.concatenate([none, *(pair[k] for pair in pairs)]) for k in (0, 1)))


def clustered(count: int, centers: int, width: int, spread: float, seed: int) -> Vectors:
    """Vectors around random directions, of other lengths each: cosines within a cluster lie around the bound."""
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=(centers, width))
    made = middle[rng.integers(0, centers, count)] + spread * rng.normal(size=(count, width))
    return (made * rng.uniform(0.5, 2, (count, 1))).astype(np.float16)


@pytest.mark.parametrize("bound", [0.9, 0.96, 1.0])
def test_groups_are_those_of_comparing_all_with_all(bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="the extra 'dedup' is not installed")
    monkeypatch.setattr(module, "BLOCK", 64)
    vectors = clustered(500, 150, 24, 0.18, seed=1)
    vectors[300:310] = vectors[0]
    twin = groups(500, [every_pair(vectors, bound)])
    found = list(near_vectors(vectors, bound))
    assert (groups(500, found) == twin).all()
    assert all((i < j).all() for i, j in found)
    assert 100 < len(set(twin.tolist())) < 495


def test_beyond_a_size_hardly_a_pair_is_missed_and_none_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="the extra 'dedup' is not installed")
    monkeypatch.setattr(module, "PER_CELL", 50)
    vectors = clustered(3000, 900, 32, 0.14, seed=2)
    i, j = every_pair(vectors, 0.96)
    twin, found = (groups(3000, pairs) for pairs in ([(i, j)], list(near_vectors(vectors, 0.96, exact_up_to=0))))
    assert len(i) > 1000
    assert (found[i] == found[j]).mean() >= 0.98
    assert len(set(zip(twin.tolist(), found.tolist(), strict=True))) == len(set(found.tolist()))  # found divides twin
    again = groups(3000, list(near_vectors(vectors, 0.96, exact_up_to=0)))
    assert (again == found).all()


def test_nothing_to_compare() -> None:
    pytest.importorskip("faiss", reason="the extra 'dedup' is not installed")
    assert list(near_vectors(np.empty((0, 8), dtype=np.float16), 0.9)) == []
    assert list(near_vectors(np.ones((1, 8), dtype=np.float16), 0.9)) == []


def test_spanning_pairs_connect_the_same_with_fewer() -> None:
    rng = np.random.default_rng(3)
    i, j = np.sort(rng.integers(0, 400, (2, 300)), axis=0)
    i, j = i[i < j], j[i < j]
    left, right = spanning(i, j)
    assert (connected(400, left, right) == connected(400, i, j)).all()
    assert (left < right).all() and len(set(right.tolist())) == len(right)


def test_without_faiss_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(BadInput, match=r"needs faiss.*pip install 'capipe\[dedup\]'"):
        require_faiss()
