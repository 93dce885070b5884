"""A few hostile artifacts before every command; the long trial is the same program with more of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .sound_artifacts import commands

ROOT = Path(__file__).resolve().parents[2]
CASES = 14


@pytest.mark.slow
def test_nothing_outside_of_a_hostile_artifact_is_touched(tmp_path: Path) -> None:
    """In a process of its own, whose memory is that of the commands and not of the tests before."""
    words = [sys.executable, "-m", "tests.pipeline.fuzz_artifacts", "--cases", str(CASES), "--seed", "9"]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *faults, last = done.stdout.splitlines()
    counts = json.loads(last)
    assert faults == [] and counts["faults"] == 0
    assert counts["cases"] == counts["verify"] == counts["view"] == CASES
    assert {name for name in counts if name not in ("cases", "faults")} == {*commands(tmp_path, "shards")}
