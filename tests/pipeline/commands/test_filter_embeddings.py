"""`capipe filter --embeddings`: scores without a second look at the images, beside those of the vision encoder."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import SAFETY
from capipe.models.scorers.stored import ROUNDING
from capipe.models.tiny.world.corpus import samples
from capipe.pipeline.cli import main
from capipe.pipeline.inspect.verify import verify

from ...stages.scored import write_scores
from ..conftest import capipe, table
from .test_filter_scoring import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shown") / "shards", list(samples(26, "heldout", seed=51)), 13)


@pytest.fixture(scope="module")
def embedded(shards: Path) -> Path:
    out = shards.parent / "embeddings"
    capipe("embed", "--shards", shards, "--out", out, "--clip", "tiny/clip")
    return out


def score(shards: Path, out: Path, *more: object) -> None:
    capipe("filter", "--shards", shards, "--out", out, "--clip", "tiny/clip", *more)


def test_scores_are_the_vision_encoders_within_the_rounding_of_embeddings(
    shards: Path, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(shards, tmp_path / "slow")
    score(shards, tmp_path / "fast", "--embeddings", embedded)
    slow, fast = (table(tmp_path / name / "scores") for name in ("slow", "fast"))
    assert {row["status"] for row in fast} == {"ok", "unsupported", "empty"}
    differences = []
    for one, other in zip(slow, fast, strict=True):
        names = [name for name in one if name.endswith(("_score", "_mean", "_min")) and one[name] is not None]
        differences += [abs(one.pop(name) - other.pop(name)) for name in names]
        assert {**one, "org_clip_lowest": 0} == {**other, "org_clip_lowest": 0}  # two sentences may be equally bad
    assert len(differences) == 3 * sum(row["status"] == "ok" for row in slow)
    assert 0 < np.max(differences) <= ROUNDING
    assert verify(str(tmp_path / "fast/scores")).faults == []
    assert Artifact.open(str(tmp_path / "fast/scores")).config["semantic"]["embeddings"] == (
        Artifact.open(str(embedded)).fingerprint
    )
    others = ("--shards", shards, "--out", tmp_path / "slow", "--clip", "tiny/clip", "--embeddings", embedded)
    assert "embeddings: null -> " in refusal(monkeypatch, *others)  # scores of another origin are there


def refusal(monkeypatch: pytest.MonkeyPatch, *options: object) -> str:
    """What a refused `capipe filter` says, run in this process: a line on stderr."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["capipe", "filter", *map(str, options)])
    monkeypatch.setattr(sys, "stderr", said)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and said.getvalue().count("\n") == 1
    return said.getvalue()


def test_embeddings_that_do_not_fit_are_refused_in_a_line(
    shards: Path, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--shards", shards, "--out", tmp_path / "out", "--embeddings")
    line = refusal(monkeypatch, *common, embedded, "--clip", "tiny/eval-clip")
    assert (
        f"{embedded}: embedded by another model than --clip tiny/eval-clip" in line and "scorers.clip.model: " in line
    )
    line = refusal(monkeypatch, *common, embedded, "--clip", "tiny/clip", "--dtype", "bfloat16")
    assert 'scorers.clip.dtype: "auto" -> "bfloat16"' in line
    assert "name it by --clip" in refusal(monkeypatch, *common, embedded, "--itm", "tiny/itm")
    assert "not an artifact" in refusal(monkeypatch, *common, shards, "--clip", "tiny/clip")
    write_scores(shards, tmp_path / "scores")
    line = refusal(monkeypatch, *common, tmp_path / "scores", "--clip", "tiny/clip")
    assert "an artifact of stage 'score'; --embeddings takes one of `capipe embed`" in line
    scored = ("--scores", tmp_path / "scores", "--embeddings", embedded)
    line = refusal(monkeypatch, "--shards", shards, "--out", tmp_path / "out", *scored)
    assert "name it by --clip" in line
    line = refusal(monkeypatch, "--shards", shards, "--out", tmp_path / "out", *scored, "--clip", "tiny/clip")
    assert "scored already" in line
    others = write_shards(tmp_path / "others", list(samples(26, "heldout", seed=52)), 13)
    other = ("--shards", others, "--out", tmp_path / "out", "--clip", "tiny/clip", "--embeddings", embedded)
    assert "found; it was not made of these shards" in refusal(monkeypatch, *other)
    more = write_shards(tmp_path / "more", list(samples(27, "heldout", seed=51)), 13)
    other = ("--shards", more, "--out", tmp_path / "out", "--clip", "tiny/clip", "--embeddings", embedded)
    assert f"{embedded}: has no shard 00002" in refusal(monkeypatch, *other)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_unsafe_comes_from_the_embeddings_too(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("nudenet")
    embedded = tmp_path / "embedded"
    capipe("embed", "--shards", shards, "--out", embedded, "--clip", "tiny/clip", "--safety")
    rows = table(embedded)
    assert {row["unsafe"] for row in rows if row["status"] == "ok"} == {0.0}
    assert verify(str(embedded)).faults == []
    marked = _with_unsafe(Artifact.open(str(embedded)), tmp_path / "seen")
    score(shards, tmp_path / "fast", "--safety", "--embeddings", marked)
    scores = table(tmp_path / "fast/scores")
    assert all((row["unsafe"], row["unsafe_labels"]) == (0.75, ["X"]) for row in scores if row["status"] == "ok")
    score(shards, tmp_path / "without", "--embeddings", marked)
    assert {row["unsafe"] for row in table(tmp_path / "without/scores")} == {None}  # nobody asked for it


def _with_unsafe(source: Artifact, out: Path) -> Path:
    """The same embeddings with a safety score that the detector does not give: where it is from can be told."""
    from capipe.manifests.schema import embedding

    made = Artifact.create(str(out), "embed", source.config["semantic"], {})
    width = len(next(row["image_embedding"] for row in source.read_rows("00000") if row["image_embedding"]))
    for name, record in source.committed().items():
        with made.begin(name, embedding(width, safety=True)) as writer:
            for row in source.read_rows(name):
                writer.write({**row, "unsafe": 0.75, "unsafe_labels": ["X"]} if row["status"] == "ok" else row)
            writer.commit(rows_in=record.count, input_info=record.input)
    made.close()
    return out


def test_the_columns_of_safety_are_those_of_scores() -> None:
    from capipe.manifests.schema import SCORE, embedding

    for field in SAFETY:
        assert SCORE.field(field.name) == field == embedding(4, safety=True).field(field.name)
    assert json.dumps(embedding(4).names).count("unsafe") == 0
