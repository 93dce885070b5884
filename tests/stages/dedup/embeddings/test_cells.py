"""Who is in which cell, and which cells are a task."""

from __future__ import annotations

import numpy as np
import pytest

from capipe.stages.dedup.embeddings import cells
from capipe.stages.dedup.embeddings.backends import backend_of, unit
from capipe.stages.dedup.embeddings.cells import CellRange, assign, cell_count, divide, is_seen, seen_count

from ...vectors import clustered


def test_a_vector_lives_with_its_nearest_centroid_and_visits_cells_whose_border_is_near() -> None:
    vectors, centroids = clustered(300, 30, 16, 0.5, seed=1), unit(clustered(25, 25, 16, 1.0, seed=2))
    entries = assign(vectors, centroids, backend_of("cpu"))
    products = unit(vectors).astype(np.float64) @ centroids.T.astype(np.float64)
    own = products.argmax(axis=1)
    visits = 0
    for cell in range(25):
        living, visiting = (
            set(entries.rows[entries.starts[code] : entries.starts[code + 1]].tolist())
            for code in (2 * cell, 2 * cell + 1)
        )
        assert living == set(np.flatnonzero(own == cell).tolist())
        far = np.linalg.norm(centroids[cell] - centroids[own], axis=1)
        border = (products[np.arange(300), own] - products[:, cell]) / np.where(far > 0, far, 1)
        near = set(np.flatnonzero((own != cell) & (border <= cells.REACH)).tolist())
        nearest = {row for row in near if cell in np.argsort(-products[row])[: cells.PROBES]}
        assert visiting == nearest
        visits += len(visiting)
    assert visits > 100 and entries.starts[-1] == len(entries.rows) == 300 + visits
    assert np.allclose(entries.similar, products.max(axis=1), atol=1e-6)


def test_as_many_cells_as_balance_assigning_and_comparing() -> None:
    assert cell_count(cells.ALL_UP_TO) == 1 and cell_count(1_000_000) == 2000
    assert seen_count(100) == 100 and seen_count(10_000) == cells.LEAST_SEEN
    assert is_seen(np.arange(10_000), 10_000).sum() == cells.LEAST_SEEN
    assert seen_count(10**9) == cells.MOST_SEEN


def test_each_cell_is_in_one_task_which_holds_and_compares_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "WORK", 2000)
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 30, 400)
    counts[100:102] = 90, 20  # 9,900 pairs: five tasks
    ranges = list(divide(counts, 150))
    assert [cell for each in ranges if each.part == 0 for cell in range(each.first, each.last)] == list(range(200))
    assert [each for each in ranges if each.first <= 50 < each.last] == [CellRange(50, 51, k, 5) for k in range(5)]
    living, visiting = counts[0::2], counts[1::2]
    for each in ranges:
        part = slice(each.first, each.last)
        assert each.last == each.first + 1 or (living[part] + visiting[part]).sum() <= 150
        assert (living[part] * (living[part] + visiting[part])).sum() / each.parts <= 2000
    assert list(divide(np.zeros(0, dtype=np.int64), 10)) == []
