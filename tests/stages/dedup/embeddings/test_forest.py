"""Maximum spanning forests against a plain union-find and against all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from capipe.stages.dedup.embeddings.backends import unit
from capipe.stages.dedup.embeddings.forest import Edges, cosines, joined, maximum_forest, near_forest, reach

from ...vectors import clustered, every_pair, groups


def random_edges(nodes: int, count: int, levels: int, seed: int) -> Edges:
    """Edges, some of them several times, with few different cosines."""
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, nodes, (2, count))
    return Edges(np.minimum(left, right), np.maximum(left, right), rng.integers(0, levels, count) / levels)


@pytest.mark.parametrize("levels", [1, 5, 100_000])
def test_at_every_threshold_the_forest_connects_what_all_edges_connect(levels: int) -> None:
    edges = random_edges(300, 900, levels, seed=levels)
    forest = maximum_forest(edges)
    assert (forest.left < forest.right).all()
    assert len(forest) == 300 - len(np.unique(groups(300, edges)))
    for threshold in np.linspace(0, 1, 25):
        assert (groups(300, forest.reaching(threshold)) == groups(300, edges.reaching(threshold))).all()


def test_the_order_of_edges_and_their_parts_do_not_matter() -> None:
    edges = random_edges(200, 800, 3, seed=4)
    shuffled = edges.take(np.random.default_rng(5).permutation(len(edges)))
    halves = [maximum_forest(shuffled.take(np.arange(len(edges)) % 2 == half)) for half in (0, 1)]
    whole, again = maximum_forest(edges), maximum_forest(joined(halves))
    for name in ("left", "right", "cosine"):
        assert (getattr(whole, name) == getattr(again, name)).all()


@pytest.mark.parametrize("bound", [0.9, 0.97])
@pytest.mark.parametrize("centers", [3, 60])
def test_pairs_left_unverified_are_not_missed(bound: float, centers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In dense clusters, of whose pairs only some are verified, and with a search that is off by much."""
    vectors = clustered(400, centers, 24, 0.18, seed=centers)
    vectors[300:310] = vectors[0]
    every = every_pair(vectors, bound)
    left, right = np.triu_indices(len(vectors), 1)
    noise = np.random.default_rng(1).uniform(-0.01, 0.01, len(left))
    similar = (cosines(vectors, left, right) + noise).astype(np.float32)
    likely = similar >= bound - 0.0101
    looked_at = 0

    def counted(*pairs: np.ndarray) -> np.ndarray:
        nonlocal looked_at
        looked_at += len(pairs[1])
        return cosines(*pairs)

    monkeypatch.setattr("capipe.stages.dedup.embeddings.forest.cosines", counted)
    monkeypatch.setattr("capipe.stages.dedup.embeddings.forest._AT_ONCE", 64)
    forest = near_forest(vectors, left[likely], right[likely], similar[likely], bound, 0.0101)
    for threshold in np.linspace(bound, 1, 12):
        assert (groups(400, forest.reaching(threshold)) == groups(400, every.reaching(threshold))).all()
    assert centers == 60 or looked_at < 0.8 * likely.sum()


def test_a_vector_is_near_itself_at_every_length() -> None:
    vectors = clustered(50, 50, 512, 1.0, seed=6)
    both = np.concatenate([vectors, (2 * vectors.astype(np.float32)).astype(np.float16)])
    assert reach(cosines(both, np.arange(50), np.arange(50, 100)), 1.0).all()
    assert np.allclose(np.linalg.norm(unit(both), axis=1), 1, atol=1e-6)
