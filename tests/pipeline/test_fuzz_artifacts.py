"""A few hostile artifacts before every command; the long trial is :mod:`.fuzz_artifacts`, as a program."""

from __future__ import annotations

from pathlib import Path

import pytest

from .fuzz_artifacts import Case, cases, trial
from .sound_artifacts import commands, prepare


@pytest.mark.slow
def test_nothing_outside_of_a_hostile_artifact_is_touched(tmp_path: Path) -> None:
    prepare(tmp_path / "data", images=3)
    chosen = cases(tmp_path / "data", 14, seed=9)
    found: list[tuple[Case, list[str]]] = []
    counts = trial(tmp_path / "data", chosen, tmp_path / "attack", lambda case, faults: found.append((case, faults)))
    assert [each for each in found if each[1]] == []
    assert counts["cases"] == counts["verify"] == counts["view"] == 14
    assert {name for name in counts if name not in ("cases", "faults")} == {*commands(tmp_path, "shards")}
