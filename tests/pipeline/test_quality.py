"""The short version of :mod:`.quality`; the bounds of the long one are a little tighter."""

from __future__ import annotations

from pathlib import Path

import pytest

from capipe.models.tiny.world.corpus import CorpusSample, write_corpus

from .conftest import capipe
from .quality import Written, graded_trial, planted_trial, written_trial

ENGINE = ("--engine", "transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> list[CorpusSample]:
    """Sixty held-out scenes, ingested."""
    samples = write_corpus(folder / "corpus", 60, "heldout", 32)
    capipe("ingest", folder / "corpus", "--out", folder / "shards", "--shard-size", 100)
    return samples


@pytest.fixture(scope="module")
def written(folder: Path, corpus: list[CorpusSample]) -> Written:
    """What the teacher wrote about them."""
    options = ("--model", "tiny/teacher", "--per-image", 3, *ENGINE)
    return written_trial(folder / "shards", corpus, folder / "qa", *options)


@pytest.mark.slow
def test_quizzes_are_right_and_the_screen_sees(folder: Path, corpus: list[CorpusSample], written: Written) -> None:
    assert written.gold >= 0.88 and written.kept >= 80
    screen = ("--screen-model", "tiny/teacher", *ENGINE)
    planted = planted_trial(folder / "shards", corpus, folder / "planted", 40, *screen)
    assert planted.leaked_rejected >= 0.92 and planted.wrong_rejected >= 0.92 and planted.good_kept >= 0.75


@pytest.mark.slow
def test_captions_lie_between_floor_and_ceiling(folder: Path, written: Written) -> None:
    plain = ("--model", "tiny/captioner", "--reader", "tiny/holdout-reader", "--samples", 2, "--max-tokens", 200)
    graded = graded_trial(folder / "shards", folder / "qa", folder / "eval", *plain, *ENGINE)
    floor = max(graded.accuracy[name] for name in ("blind", "empty", "generic"))
    assert floor <= 0.06 and graded.accuracy["oracle"] >= 0.92
    assert floor + 0.05 < graded.accuracy["plain"] < graded.accuracy["oracle"] - 0.3
