"""The short version of :mod:`.quality`; the bounds of the long one are a little tighter."""

from __future__ import annotations

from pathlib import Path

import pytest

from capipe.models.tiny import is_bundled
from capipe.models.tiny.corpus import write_corpus

from .conftest import capipe
from .quality import graded_trial, planted_trial, written_trial

pytestmark = pytest.mark.skipif(not is_bundled("teacher"), reason="tiny/teacher is not trained yet")


@pytest.mark.slow
def test_quizzes_are_right_the_screen_sees_and_captions_lie_between_floor_and_ceiling(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", 60, "heldout", 32)
    shards = tmp_path / "shards"
    capipe("ingest", tmp_path / "corpus", "--out", shards, "--shard-size", 100)
    engine = ("--engine", "transformers")
    written = written_trial(shards, corpus, tmp_path / "qa", "--model", "tiny/teacher", "--per-image", 3, *engine)
    assert written.gold >= 0.88 and written.kept >= 80
    planted = planted_trial(shards, corpus, tmp_path / "planted", 40, "--screen-model", "tiny/teacher", *engine)
    assert planted.leaked_rejected >= 0.92 and planted.wrong_rejected >= 0.92 and planted.good_kept >= 0.75
    plain = ("--model", "tiny/captioner", "--reader", "tiny/holdout-reader", "--samples", 2, "--max-tokens", 200)
    graded = graded_trial(shards, tmp_path / "qa", tmp_path / "eval", *plain, *engine)
    floor = max(graded.accuracy[name] for name in ("blind", "empty", "generic"))
    assert floor <= 0.06 and graded.accuracy["oracle"] >= 0.92
    assert floor + 0.05 < graded.accuracy["plain"] < graded.accuracy["oracle"] - 0.3
