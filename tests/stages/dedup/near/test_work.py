"""The whole search, against its slow twin: every candidate by another search, each confirmed by the slow judgement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from capipe.stages.dedup.arrays import U64
from capipe.stages.dedup.near import files, joining, partition, table_search
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
            (files, "ROWS", 64), (joining, "PRODUCTS", 40), (partition, "WORK", 50), (partition, "PAIRS_IN_MEMORY", 80),
            (partition, "LOOKS", 30), (table_search, "PART", 100), (near_hashes, "LONG", 12), (near_hashes, "DENSE", 2),
            (tables, "_PER_TABLE", 0.0), (table_search, "_PER_TASK", 0.0), (tables, "PER_PAIR", 1e-6),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, value)
    return str(request.param)


@pytest.mark.parametrize("kind", ["spread", "crowded", "dense"])
@pytest.mark.parametrize("radius", [0, 3, 7])
def test_groups_and_matches_are_those_of_the_slow_twin(kind: str, radius: int, bounds: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(radius)
    count, others = 300, 60
    centres, bits = {"spread": (150, 6), "crowded": (20, 8), "dense": (2, 5)}[kind]
    phash = crowded(count + others, centres, bits, rng)
    inner = np.where(rng.random(len(phash)) < 0.4, phash, flipped(phash[rng.permutation(len(phash))], 4, rng))
    looks = plain_looks(rng.choice(LEVELS, len(phash)))
    files_, references = slice(0, count), slice(count, None)
    hashed = hash_set(tmp_path / "hashes", phash[files_], inner[files_], looks[files_], 1, 70)
    against = hash_set(tmp_path / "against", phash[references], inner[references], looks[references], 2, 25)
    for wanted in (None, against):
        found = outcome(searched(tmp_path / f"near{wanted is None}", hashed, wanted, radius), count)
        assert found == outcome(searched_slowly(hashed, wanted, radius), count)
    assert radius < 7 or (found[1] and len(set(found[0])) < count - 20)
