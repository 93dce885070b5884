"""Question sets whose records are larger than anybody means them to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .test_import_sets import QUESTION, read


@pytest.mark.parametrize("deep", ["[" * 20_000 + "]" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000])
def test_depths_cost_one_record(tmp_path: Path, deep: str) -> None:
    good = json.dumps({"image": "a.jpg", **QUESTION})
    bad = f'{{"image": "b.jpg", "question": {deep}}}'
    (tmp_path / "a.json").write_text(f"[{good}, {bad}, {good}]")
    (tmp_path / "a.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
    for name in ("a.json", "a.jsonl"):
        first, broken, last = read(tmp_path / name)
        assert first.images == last.images == ("a.jpg",)
        assert "nested too deeply" in str(broken.questions)
