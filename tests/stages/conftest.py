"""A folder of pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import photo


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(25):
        (root / f"{number:02d}.jpg").write_bytes(photo(number))
        (root / f"{number:02d}.txt").write_text(f"picture {number}")
    return root
