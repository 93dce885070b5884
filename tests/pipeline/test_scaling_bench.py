"""`bench/scaling.py` and `bench/costs.py`: the artifacts are valid, every step runs, the arithmetic is right."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from capipe.pipeline.inspect.verify import verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield
    for name in {"_common", "_synthetic", "costs", "scaling"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def scaling(bench: None) -> ModuleType:
    return import_module("scaling")


def test_every_step_runs_on_artifacts_that_are_sound(scaling: ModuleType, tmp_path: Path) -> None:
    import_module("_synthetic").build(tmp_path, 3, 5)
    for name in ("images", "captions", "scores"):
        assert verify(str(tmp_path / name)).faults == []
    for step in scaling.STEPS.values():
        step(tmp_path)
    assert verify(str(tmp_path / "export")).faults == verify(str(tmp_path / "selected/shards")).faults == []
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_exponents_and_costs(scaling: ModuleType) -> None:
    assert scaling._exponents({10: 1.0, 100: 10.0, 1000: 1000.0}) == {"10-100": 1.0, "100-1000": 2.0}
    costs = import_module("costs")
    assert costs.grown(2.0, 10, 2.0, 100) == 200.0 and costs.grown(2.0, 10, 0.5, 100) == 20.0
    result = {"shards": [10, 100], "rows_per_shard": 5, "exponents": {}, "core_seconds": {}}
    for name in {**costs.BY_SHARDS, **costs.BY_ROWS}:
        result["exponents"][name], result["core_seconds"][name] = {"10-100": 1.0}, {"10": 1.0, "100": 10.0}
    by_title = {title: at for title, _, at in costs.rows({"scaling": result})}
    assert by_title[costs.BY_SHARDS["status"]] == [50.0, 1000.0, 10_000.0]  # 500 shards: five times a hundred
    assert by_title[costs.BY_ROWS["select"]][0] == 10.0 * 5e6 / 500
    assert costs.shown(30) == "30 core-seconds" and costs.shown(7200) == "2 core-hours"
