"""`capipe render`: which scenes are in the folder that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..conftest import capipe


def things(folder: Path) -> list[int]:
    """Number of things of each image, by its metadata."""
    return [len(json.loads(file.read_text())["scene"]["things"]) for file in sorted(folder.glob("*.json"))]


@pytest.mark.parametrize(("share", "fewest", "most"), [("0", 1, 5), ("1", 6, 9)])
def test_crowded_scenes_are_as_many_as_asked_for(tmp_path: Path, share: str, fewest: int, most: int) -> None:
    capipe("render", "--out", tmp_path / "made", "--images", 12, "--crowded", share)
    counts = things(tmp_path / "made")
    assert len(counts) == 12 and fewest <= min(counts) and max(counts) <= most


def test_a_share_above_one_is_refused(tmp_path: Path) -> None:
    done = capipe("render", "--out", tmp_path / "made", "--crowded", 1.5, code=2)
    assert "crowded" in done.stderr and not (tmp_path / "made").exists()
