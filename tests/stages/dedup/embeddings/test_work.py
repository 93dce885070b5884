"""The whole search by embeddings, against its slow twin: all pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from capipe.manifests.artifact import Artifact
from capipe.stages.dedup.embeddings import cell_task, cells, reading
from capipe.stages.dedup.embeddings.forest import Edges, Vectors, cosines
from capipe.stages.dedup.embeddings.reading import ReferenceVectors, read_references
from capipe.stages.dedup.embeddings.work import STAGE, EmbeddingSearch, NearFiles, read_found, write_found

from ...vectors import clustered, embedded_files, every_pair, groups, searched

pytest.importorskip("faiss", reason="the extra 'dedup' is not installed")


@pytest.fixture(params=["as it is", "small parts"])
def bounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All limits as they are, or so low that each comes into play, with all pairs in one cell all the same."""
    if request.param == "small parts":
        for module, name, value in (
            (reading, "PART_BYTES", 100 * 2 * 24), (cells, "WORK", 20_000), (cell_task, "_MANY", 50),
            (cell_task, "_QUERIES", 32), (cell_task, "_OTHERS", 48),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, value)
    return str(request.param)


def reference_set(folder: Path, vectors: Vectors) -> ReferenceVectors:
    _, artifact, _ = embedded_files(folder, vectors, 40, seed=9)
    return read_references([artifact])


def same(a: NearFiles, b: NearFiles) -> bool:
    """Whether two searches found the same edges, in any order of equal cosines."""
    return all(
        np.array_equal(getattr(getattr(a, part), name), getattr(getattr(b, part), name))
        for part in ("edges", "matches")
        for name in ("left", "right", "cosine")
    )


@pytest.mark.parametrize("device", ["faiss", "cpu"])
@pytest.mark.parametrize("bound", [0.9, 0.96, 1.0])
def test_in_one_cell_groups_and_matches_are_those_of_all_pairs(
    bound: float, device: str, bounds: str, tmp_path: Path
) -> None:
    vectors = clustered(500, 150, 24, 0.18, seed=1)
    vectors[300:310] = vectors[0]
    others = np.concatenate([clustered(60, 150, 24, 0.18, seed=1)[:50], vectors[:10]])
    hashed, artifact, file = embedded_files(tmp_path, vectors, 60)
    references = reference_set(tmp_path / "references", others)
    near = searched(tmp_path / "work", hashed, artifact, bound, references, device)
    every = every_pair(vectors, bound)
    twin = groups(500, Edges(file[every.left], file[every.right], every.cosine))
    assert (groups(500, near.edges) == twin).all() and 100 < len(set(twin.tolist())) < 495
    between = every_pair(vectors, bound, others)
    nearest: dict[int, tuple[float, int]] = {}
    for i, j, value in zip(between.left, between.right, between.cosine, strict=True):
        best = (-float(value), int(references.rows[j]))
        nearest[int(file[i])] = min(nearest.get(int(file[i]), best), best)
    found = {
        int(i): (-float(c), int(j))
        for i, j, c in zip(near.matches.left, near.matches.right, near.matches.cosine, strict=True)
    }
    # of equal vectors one has the match: they are a group at every threshold
    assert found.items() <= nearest.items()
    assert {twin[i] for i in found} == {twin[i] for i in nearest} and found


@pytest.mark.parametrize("lowest", [0.9, 0.94])
def test_any_higher_threshold_replays_to_what_a_fresh_search_gives(
    lowest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in many cells, where pairs are missed: the same ones at every threshold."""
    monkeypatch.setattr(cells, "ALL_UP_TO", 100)
    monkeypatch.setattr(cells, "PROBES", 1)
    vectors = clustered(1200, 400, 24, 0.22, seed=2)
    vectors[900:1000] = clustered(100, 1, 24, 0.1, seed=3)  # a dense cluster
    hashed, artifact, file = embedded_files(tmp_path, vectors, 300)
    references = reference_set(tmp_path / "references", vectors[::40] + np.float16(0.05))
    kept = searched(tmp_path / "kept", hashed, artifact, lowest, references)
    every = every_pair(vectors, lowest)
    twin = groups(1200, Edges(file[every.left], file[every.right], every.cosine))
    assert len(np.unique(twin)) < len(np.unique(groups(1200, kept.edges))), "no pair was missed: the test shows nothing"
    counts = set()
    for number, threshold in enumerate((lowest, 0.95, 0.963, 0.98, 0.999)):
        fresh = searched(tmp_path / f"fresh{number}", hashed, artifact, threshold, references)
        replayed = kept.reaching(threshold)
        assert (groups(1200, replayed.edges) == groups(1200, fresh.edges)).all()
        for name in ("left", "right", "cosine"):
            assert (getattr(replayed.matches, name) == getattr(fresh.matches, name)).all()
        counts.add(len(fresh.edges))
    assert len(counts) == 5


def test_planted_pairs_just_above_the_threshold_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 99 %, on clustered vectors in many cells, by each backend; and nothing is invented."""
    monkeypatch.setattr(cells, "ALL_UP_TO", 100)
    rng = np.random.default_rng(4)
    vectors = clustered(4000, 40, 64, 0.9, seed=4).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    aside = rng.normal(size=(1000, 64))
    aside -= (aside * vectors[:1000]).sum(axis=1, keepdims=True) * vectors[:1000]
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    cosine = rng.uniform(0.9605, 0.97, (1000, 1))
    vectors[-1000:] = cosine * vectors[:1000] + np.sqrt(1 - cosine**2) * aside
    stored = vectors.astype(np.float16)
    hashed, artifact, file = embedded_files(tmp_path, stored, 1000)
    for device in ("faiss", "cpu"):
        near = searched(tmp_path / device, hashed, artifact, 0.96, device=device)
        found = groups(4000, near.edges)
        assert (found[file[:1000]] == found[file[-1000:]]).mean() >= 0.99
        at = np.empty(4000, dtype=np.int64)
        at[file] = np.arange(4000)
        assert np.array_equal(cosines(stored, at[near.edges.left], at[near.edges.right]), near.edges.cosine)
        assert (near.edges.cosine >= 0.96 - 1e-9).all()


def test_neither_parts_nor_their_order_matter_in_many_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "ALL_UP_TO", 100)
    vectors = clustered(900, 150, 24, 0.16, seed=5)
    uids = [f"{number:032x}" for number in np.random.default_rng(6).permutation(900)]
    hashed, artifact, _ = embedded_files(tmp_path / "a", vectors, 900, uids=uids)
    whole = searched(tmp_path / "whole", hashed, artifact, 0.93)
    monkeypatch.setattr(reading, "PART_BYTES", 100 * 2 * 24)
    hashed, artifact, _ = embedded_files(tmp_path / "b", vectors[::-1].copy(), 50, uids=uids[::-1])
    parts = searched(tmp_path / "parts", hashed, artifact, 0.93)
    assert same(whole, parts) and len(whole.edges) > 100
    assert np.array_equal(whole.similar, parts.similar)


def test_a_stopped_search_goes_on_with_the_tasks_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "ALL_UP_TO", 100)
    monkeypatch.setattr(reading, "PART_BYTES", 100 * 2 * 24)
    vectors = clustered(600, 100, 24, 0.16, seed=7)
    hashed, artifact, _ = embedded_files(tmp_path, vectors, 80)
    whole = searched(tmp_path / "whole", hashed, artifact, 0.93)
    search = EmbeddingSearch(hashed, artifact, None, 24, 0.93, ["faiss"])
    work = Artifact.create(str(tmp_path / "stopped"), STAGE, search.config, {})
    done = 0
    for _ in range(100):  # one task at a time, as if each run was killed after it
        step = next((step for step in search.steps(work) if step.todo), None)
        if step is None:
            break
        step.write(step.todo[-1], artifact=work.attach())
        done += 1
    assert done > 10 and same(search.result(work), whole)
    work.close()


def test_what_was_found_is_read_back_and_half_of_it_is_not(tmp_path: Path) -> None:
    vectors = clustered(300, 60, 24, 0.16, seed=8)
    vectors[5] = np.nan
    hashed, artifact, file = embedded_files(tmp_path, vectors, 100)
    near = searched(tmp_path / "work", hashed, artifact, 0.93, reference_set(tmp_path / "r", vectors[100:140]))
    assert np.flatnonzero(np.isnan(near.similar)).tolist() == [file[5]] and len(near.matches) > 10
    kept = Artifact.create(str(tmp_path / "kept"), STAGE, {}, {})
    assert read_found(kept, 300) is None
    write_found(near, kept)
    found = read_found(kept, 300)
    assert found is not None and same(found, near) and np.array_equal(found.similar, near.similar, equal_nan=True)
    kept.close()


@pytest.mark.parametrize("count", [1, 3])
def test_vectors_of_which_none_is_usable(count: int, tmp_path: Path) -> None:
    hashed, artifact, _ = embedded_files(tmp_path, np.zeros((count, 8), dtype=np.float16), 2)
    near = searched(tmp_path / "work", hashed, artifact, 0.9)
    assert len(near.edges) == 0 and np.isnan(near.similar).all()
