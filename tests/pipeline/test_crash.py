"""`kill -9` at random moments loses nothing, doubles nothing, and costs little engine time."""

from __future__ import annotations

from pathlib import Path

import pytest

from .crash import crash_trial


@pytest.mark.slow
def test_kill_and_resume(tmp_path: Path) -> None:
    trial = crash_trial(tmp_path, kills=3, shards=30, images=12, engine="transformers", concurrency=8, seed=1)
    assert trial.kills == 3, "the run was over too soon to be killed; make it longer"
    assert trial.equal and trial.faults == [] and trial.leftovers == []
    assert trial.requests <= trial.requests_alone + trial.kills * 4 * 8  # what was in flight, and no more
