"""A list in a recipe: stages run again on what they have, with their dependents, and none starts over."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from capipe.pipeline.inspect.chain_state import load_chain

from ..chain.test_run import commands, run, served, states
from ..chains import chain_of, verdicts
from ..conftest import CaptionServer, one_line, table
from ..withdrawing import contents, is_clean, listed, marks, touched


@pytest.fixture
def captioned(tmp_path: Path, server: CaptionServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run(Path("out"), stages=served(server.url))
    return Path("out")


def test_a_list_in_a_recipe_costs_the_rows_it_names(captioned: Path, server: CaptionServer) -> None:
    stages, out = served(server.url), captioned
    captions, final = table(out / "captions"), marks(out / "final")
    gone = [captions[1]["uid"]]
    listed(Path("uids.txt"), gone)
    asked, before = server.requests, marks(out / "captions")
    drop = "stages.captions.config.drop=uids.txt"
    assert verdicts(chain_of(out.parent, drop, stages=stages), out)["captions"] == "changed"

    finished = run(out, drop, stages=stages)
    assert commands(finished) == ["annotate", "export"] and "removing" not in finished.stderr
    assert "captions (annotate): changed, drop" in finished.stderr
    assert server.requests == asked  # what it has is kept
    assert touched(before, marks(out / "captions")) == touched(final, marks(out / "final")) == {"00000"}
    assert is_clean(out / "captions", gone) and is_clean(out / "final", gone)
    assert set(states(out).values()) == {"done"} and commands(run(out, drop, stages=stages)) == []

    listed(Path("uids.txt"), [*gone, captions[-1]["uid"]])  # the same option, a longer list
    finished = run(out, drop, stages=stages)
    assert commands(finished) == ["annotate", "export"] and server.requests == asked
    assert is_clean(out / "final", [captions[-1]["uid"]])

    before = marks(out / "captions")
    assert commands(run(out, drop, "stages.final.config.title=Other", stages=stages)) == ["export"]
    assert marks(out / "captions") == before


def test_a_list_is_not_left_out_again(captioned: Path, server: CaptionServer) -> None:
    stages, drop = served(server.url), "stages.captions.config.drop=uids.txt"
    absent = run(captioned, drop, stages=stages, code=2)
    assert "stages.captions.config.drop: uids.txt: nothing is there" in one_line(absent)
    listed(Path("uids.txt"), [table(captioned / "captions")[0]["uid"]])
    run(captioned, drop, stages=stages)
    before = contents(captioned / "captions")
    failed = run(captioned, stages=stages, code=2)
    assert "made with --drop, of 1 uids; give that list, or a longer one" in failed.stderr
    assert contents(captioned / "captions") == before and states(captioned)["captions"] == "failed"
    assert commands(run(captioned, drop, stages=stages)) == ["annotate"]


def test_what_a_stage_is_made_of_starts_it_over(captioned: Path, server: CaptionServer) -> None:
    """Another option beside the list clears the stage's rows, as ever, and those of its dependents."""
    stages, drop = served(server.url), "stages.captions.config.drop=uids.txt"
    gone = table(captioned / "captions")[0]["uid"]
    listed(Path("uids.txt"), [gone])
    run(captioned, drop, stages=stages)
    asked = server.requests
    finished: subprocess.CompletedProcess[str] = run(
        captioned, drop, "stages.captions.config.temperature=1", stages=stages
    )
    assert finished.stderr.count("removing out/") == 2 and server.requests == asked + 7
    assert is_clean(captioned / "final", [gone])
    state = load_chain(captioned)
    assert state is not None and all(stage.origin == stage.product for stage in state.stages)
