"""The whole search, against its slow twin: every candidate by another search, each confirmed by the slow judgement."""

from __future__ import annotations

import pickle
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from capipe.manifests.artifact import Artifact
from capipe.stages.dedup.arrays import U64, Bools
from capipe.stages.dedup.groups import Contents, connected, lookalikes
from capipe.stages.dedup.marks import Pairs
from capipe.stages.dedup.near import confirm_task, files, joining, partition, table_search
from capipe.stages.dedup.near.hash_values import hash_values
from capipe.stages.dedup.near.work import STAGE, NearSearch
from capipe.stages.dedup.perceptual_hash import Signatures
from capipe.stages.dedup.search import near_hashes, tables

from ...near import flipped, hash_set, outcome, plain_looks, searched, searched_slowly

LEVELS = np.array([20, 70, 130, 200])


def crowded(count: int, centres: int, bits: int, rng: np.random.Generator) -> U64:
    """Hashes around a few centres, so that many are near each other and some are equal."""
    middle = rng.integers(0, 1 << 64, centres, dtype=np.uint64)
    return flipped(middle[rng.integers(0, centres, count)], rng.integers(0, bits + 1, count), rng)


@pytest.fixture(params=["as it is", "small parts"])
def bounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All limits of memory as they are, or so low that each comes into play."""
    if request.param == "small parts":
        for module, name, value in (
            (files, "ROWS", 64), (joining, "PRODUCTS", 40), (partition, "WORK", 60), (partition, "PAIRS_IN_MEMORY", 90),
            (partition, "LOOKS", 40), (table_search, "PART", 200), (near_hashes, "LONG", 12), (near_hashes, "DENSE", 2),
            (tables, "PER_PAIR", 1e-7),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, value)
    return str(request.param)


@pytest.mark.parametrize(("kind", "radius"), [("spread", 7), ("crowded", 3), ("crowded", 7), ("dense", 7)])
def test_groups_and_matches_are_those_of_the_slow_twin(kind: str, radius: int, bounds: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(radius)
    count, others = 130, 40
    centres, bits = {"spread": (80, 6), "crowded": (12, 8), "dense": (2, 5)}[kind]
    phash = crowded(count + others, centres, bits, rng)
    inner = np.where(rng.random(len(phash)) < 0.4, phash, flipped(phash[rng.permutation(len(phash))], 4, rng))
    looks = plain_looks(rng.choice(LEVELS, len(phash)))
    files_, references = slice(0, count), slice(count, None)
    hashed = hash_set(tmp_path / "hashes", phash[files_], inner[files_], looks[files_], 1, 70)
    against = hash_set(tmp_path / "against", phash[references], inner[references], looks[references], 2, 25)
    for wanted in (None, against):
        found = outcome(searched(tmp_path / f"near{wanted is None}", hashed, wanted, radius), count)
        assert found == outcome(searched_slowly(hashed, wanted, radius), count)
    assert radius < 7 or (found[1] and len(set(found[0])) < count - 10)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of pairs that are confirmed from now on."""
    asked: list[int] = []
    judge = confirm_task.same_picture

    def same(a: Signatures, b: Signatures) -> Bools:
        asked.append(len(a))
        return judge(a, b)

    monkeypatch.setattr(confirm_task, "same_picture", same)
    return asked


def distinct_looks(count: int, levels: npt.NDArray[np.int64]) -> Signatures:
    """Signatures of which no two are equal, and all of one level are of the same image."""
    looks = plain_looks(levels)
    looks[:, -8:] = np.random.default_rng(3).integers(126, 131, (count, 8))
    return looks


def ball(count: int) -> U64:
    """Hashes of which all are within six bits of each other."""
    words = [sum(1 << bit for bit in bits) for n in range(4) for bits in combinations(range(64), n)]
    return np.uint64(0x0123_4567_89AB_CDEF) ^ np.array(words[:count], dtype=np.uint64)


@pytest.mark.parametrize("signatures", ["equal", "distinct"])
def test_all_hashes_equal(signatures: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Equal files cost nothing; those with a look of their own cost one confirmation each, not one per pair."""
    asked, count = counted(monkeypatch), 1500
    hashes = np.full(count, 12345, dtype=np.uint64)
    levels = np.full(count, 90)
    looks = plain_looks(levels) if signatures == "equal" else distinct_looks(count, levels)
    hashed = hash_set(tmp_path / "hashes", hashes, hashes, looks, per_shard=count)
    groups, _ = outcome(searched(tmp_path / "near", hashed), count)
    alike = lookalikes(hashed.contents)
    assert len(set(connected(count, np.arange(count), np.minimum(alike, groups)).tolist())) == 1
    assert sum(asked) == (0 if signatures == "equal" else len(np.unique(alike)) - 1)


def test_a_million_placeholders_are_one_hash(tmp_path: Path) -> None:
    """Distinct files that look exactly alike: nothing but their number grows."""
    rng = np.random.default_rng(0)
    count = 10**6
    phash = np.full(count, 7, dtype=np.uint64)
    phash[:1000] = rng.integers(0, 1 << 64, 1000, dtype=np.uint64)
    uids = np.arange(count, dtype=">u8").view("S8").astype("S16")
    contents = Contents(uids, np.ones(count, dtype=np.int64), phash, phash, phash)
    values = hash_values(contents, None)
    assert len(values) == 1001 == len(values.nodes)
    assert len(table_search.table_tasks(values.hashes, 7)) == 1


@pytest.mark.parametrize("count", [4000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_a_dense_cluster_costs_a_confirmation_per_image(
    count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = counted(monkeypatch)
    hashes = ball(count)
    hashed = hash_set(tmp_path / "hashes", hashes, hashes, distinct_looks(count, np.full(count, 90)), per_shard=count)
    groups, _ = outcome(searched(tmp_path / "near", hashed), count)
    assert not any(groups)
    assert count - 1 <= sum(asked) < 1.2 * count


@pytest.mark.slow
def test_twenty_thousand_within_the_radius_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Among as many others: the images of those that near pairs connect are one group. Two of them are seldom near each
    other: their runs are compared, and the time grows with the square (100,000 take minutes)."""
    asked, count = counted(monkeypatch), 20_000
    rng = np.random.default_rng(1)
    cluster = flipped(np.full(count, 0xFEDC_BA98_7654_3210, dtype=np.uint64), rng.integers(0, 8, count), rng)
    hashes = np.concatenate([cluster, rng.integers(0, 1 << 64, count, dtype=np.uint64)])
    looks = distinct_looks(2 * count, np.full(2 * count, 90))
    hashed = hash_set(tmp_path / "hashes", hashes, hashes, looks, per_shard=20_000)
    groups, _ = outcome(searched(tmp_path / "near", hashed), 2 * count)
    sizes = np.unique(groups, return_counts=True)[1]
    assert sizes.max() > 0.95 * count and sum(asked) < 1.5 * count


def test_a_killed_search_goes_on_and_ends_in_the_same_files(tmp_path: Path) -> None:
    """After any number of its tasks; what is committed is not done again."""
    rng = np.random.default_rng(2)
    hashes = crowded(150, 12, 6, rng)
    hashed = hash_set(tmp_path / "hashes", hashes, hashes, plain_looks(rng.choice(LEVELS, 150)))
    search = NearSearch(hashed, None, 7)
    whole, wanted = _worked(tmp_path / "whole", search, None)
    total = len(wanted)
    assert total >= 8
    for stop in range(1, total, 3):
        folder = tmp_path / f"after{stop}"
        _worked(folder, search, stop)
        resumed, files_ = _worked(folder, search, None)
        assert files_ == wanted and (resumed is not None and whole is not None)
        assert all((one == other).all() for one, other in zip(resumed, whole, strict=True))


def _worked(folder: Path, search: NearSearch, stop: int | None) -> tuple[Pairs | None, dict[str, str]]:
    """Run the tasks that are missing, at most up to ``stop`` commits; the result, and each shard's digest."""
    work = Artifact.create(str(folder), STAGE, search.config, {})
    try:
        for step in search.steps(work):
            for task in step.todo:
                if stop is not None and len(work.committed()) >= stop:
                    return None, {}
                step.write(pickle.loads(pickle.dumps(task)), artifact=work.attach())
        digests = {name: record.files[f"{name}.parquet"]["sha256"] for name, record in work.committed().items()}
        return search.result(work), digests
    finally:
        work.close()
