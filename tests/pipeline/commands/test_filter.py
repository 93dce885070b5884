"""`capipe filter` as users run it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from capipe.manifests.artifact import Artifact
from capipe.pipeline.cli import main

from ...stages.scored import foreign_shards, write_marks, write_scores
from ..conftest import capipe, one_line, table


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    foreign_shards(tmp_path / "shards", [8, 8])
    write_scores(tmp_path / "shards", tmp_path / "scores")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shards"


def test_from_scores_to_final_shards(shards: Path, tmp_path: Path) -> None:
    write_marks(shards, tmp_path / "marks", lambda i, row: {"status": "duplicate", "error": "again"} if i == 3 else {})
    common = ["filter", "--shards", shards, "--scores", tmp_path / "scores", "--marks", tmp_path / "marks"]
    options = [*common, "--keep", "clip_score > 0.1", "--top", 0.5, "--by", "clip_score_min", "--shard-size", 4]
    done = capipe(*options, "--out", tmp_path / "out")
    assert "candidates are kept" in done.stderr and "report: " in done.stderr and "2/2 shards committed" in done.stdout
    statuses = [row["status"] for row in table(tmp_path / "out/shards")]
    assert statuses[3] == "duplicate" and statuses.count("ok") == 7 and len(statuses) == 16
    assert "clean" in capipe("verify", tmp_path / "out/shards").stdout
    state = json.loads(capipe("status", tmp_path / "out/shards", "--json").stdout)
    assert (state["stage"], state["complete"], state["rows"]["ok"]) == ("select", True, 7)
    assert "clean" in capipe("verify", tmp_path / "scores").stdout
    again = capipe(*options, "--out", tmp_path / "out")
    assert "0 images" in again.stderr and "2/2 shards" in again.stdout
    refused = capipe(*common, "--top", 0.2, "--out", tmp_path / "out", code=2)
    assert "select.top: 0.5 -> 0.2" in one_line(refused) and "--fresh" in one_line(refused)
    capipe(*common, "--top", 0.2, "--out", tmp_path / "out", "--fresh")
    assert [row["status"] for row in table(tmp_path / "out/shards")].count("ok") == 3
    assert len(Artifact.open(str(tmp_path / "scores")).committed()) == 2  # scores stay


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "clap_score > 0.3"], "no column 'clap_score'; did you mean clip_score"),
        (["--keep", '__import__("os").system("touch x")'], "is a call, and nothing can be called here"),
        (["--keep", "clip_score > 7"], "keeps none of 16 candidates; among them clip_score is from 0."),
        (["--top", "1.5"], "--top: Input should be less than or equal to 1"),
        (["--top", "0"], "--top: Input should be greater than 0"),
        (["--by", "clip_score"], "--by clip_score: ranks nothing without --top"),
        (["--top", "0.5", "--by", "language"], "--by language: not a number"),
        (["--text", "new"], "--text: Input should be 'auto', 're', 'org' or 'none'"),
        (["--shard-size", "0"], "--shard-size"),
        (["--marks", "nowhere"], "nowhere: not an artifact"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    options: list[str], said: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said in refusal(monkeypatch, "--shards", shards, "--scores", tmp_path / "scores", *options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()


def refusal(monkeypatch: pytest.MonkeyPatch, *options: object) -> str:
    """What a refused command says, run in this process: a line on stderr."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["capipe", "filter", *map(str, options), "--out", "out"])
    monkeypatch.setattr(sys, "stderr", said)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and said.getvalue().count("\n") == 1
    return said.getvalue()


def test_scores_that_are_not_there(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not an artifact" in refusal(monkeypatch, "--shards", shards, "--scores", shards)
    assert "name what is to score" in refusal(monkeypatch, "--shards", shards)
    both = ("--scores", tmp_path / "scores", "--clip", "tiny/clip")
    assert "scored already" in refusal(monkeypatch, "--shards", shards, *both)


def test_an_index_and_what_it_saves(shards: Path, tmp_path: Path) -> None:
    """A dry run tells both costs and writes nothing; the index is verified, shown and exported like copied shards."""
    asked = ["filter", "--shards", shards, "--scores", tmp_path / "scores", "--keep", "clip_score > 0.1"]
    told = capipe(*asked, "--out", tmp_path / "out", "--dry-run").stdout.splitlines()
    assert len(told) == 2 and "16 candidates are kept" in told[0] and not (tmp_path / "out").exists()
    costs = r"to write: about [\d.]+ kB of images and [\d.]+ kB of rows; with --index the rows alone"
    assert re.fullmatch(costs, told[1])
    assert told[1] in capipe(*asked, "--out", tmp_path / "out", "--index").stderr
    index = tmp_path / "out/shards"
    assert not [*index.glob("*.tar")] and "clean" in capipe("verify", index).stdout
    assert "1/1 shards committed" in capipe("status", index).stdout
    capipe("export", index, "--out", tmp_path / "final", "--format", "folder")
    assert "clean" in capipe("verify", tmp_path / "final").stdout
    capipe("report", tmp_path / "out", "--out", tmp_path / "page.html")
    assert "data:image/jpeg" in (tmp_path / "page.html").read_text()


def test_a_dry_run_scores_nothing(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, "--shards", shards, "--clip", "tiny/clip", "--dry-run")
    assert "no scores yet, by which --dry-run would select" in said and not (tmp_path / "out").exists()


def test_no_model_is_near(shards: Path, tmp_path: Path) -> None:
    """Another threshold reads scores and copies images: torch is not even imported."""
    code = (
        "import sys; from capipe.pipeline.cli import app; import contextlib\n"
        "with contextlib.suppress(SystemExit): app()\n"
        "print('loaded:', [m for m in ('torch', 'transformers', 'open_clip') if m in sys.modules])"
    )
    options = ["filter", "--shards", shards, "--scores", tmp_path / "scores", "--top", 0.5, "--out", tmp_path / "out"]
    command = [sys.executable, "-c", code, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "loaded: []" in done.stdout and "1/1 shards committed" in done.stdout
