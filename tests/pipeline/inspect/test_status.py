"""`capipe status`: one artifact, a training run, a chain; finished, under way, damaged, being written."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE
from capipe.pipeline.inspect.chain_state import ChainState, StageState, save_chain
from capipe.pipeline.inspect.status import run_state, state
from capipe.pipeline.inspect.status_view import Overview, follow, lines, overview
from capipe.trainer.log import Best, write_best

from ..conftest import capipe
from ..looking import caption, write_captions, write_images, write_run


def told(view: Overview) -> str:
    return "\n".join(text for text, _ in lines(view))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "shards", [6, 6, 6, 6])
    write_captions(tmp_path / "shards", tmp_path / "captions", only=3)
    return tmp_path


def at(artifact: Path, shard: str, ago: float) -> None:
    """Say that a shard was committed so many seconds ago."""
    moment = time.time() - ago
    os.utime(artifact / f"{shard}.parquet", (moment, moment))


def test_rate_and_time_left_come_from_the_commits(folder: Path) -> None:
    for number in range(3):
        at(folder / "captions", f"{number:05d}", 30 - 3 * number)
    found = state(str(folder / "captions"))
    assert (found.shards, found.shards_total, found.rows_total) == (3, 4, 24)
    assert found.rate == pytest.approx(2.0, rel=0.01)  # 6 rows in 3 seconds
    assert found.eta == pytest.approx(3.0, abs=0.2)
    assert found.idle == pytest.approx(24.0, abs=5)
    assert not found.complete
    assert "18 of 24 rows, 2.0 rows/s, ETA 0:03" in told(overview(str(folder / "captions")))


def test_a_pause_between_two_runs_is_no_slow_run(folder: Path) -> None:
    write_images(folder / "many", [3] * 12, only=10)
    for number in range(10):
        at(folder / "many", f"{number:05d}", 20_000 - number if number < 5 else 20 - number)
    assert state(str(folder / "many")).rate == pytest.approx(3.0, rel=0.01)


def test_rows_in_journals_count_and_a_line_being_written_does_not(folder: Path) -> None:
    artifact = Artifact.open(str(folder / "captions"))
    journal = artifact.journal("00003")
    for index in range(4):
        journal.append(index, {"key": str(index), "captions": [caption("plain", "text")]})
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b"0000 half a li")
    for number in range(3):
        at(folder / "captions", f"{number:05d}", 20 - 3 * number)
    found = state(str(folder / "captions"))
    assert found.journaled == 4
    assert found.rate is not None and found.rate < 2.0
    assert "4 more rows are finished" in told(overview(str(folder)))


def test_a_folder_of_artifacts_and_what_is_damaged_in_it(folder: Path) -> None:
    write_run(folder / "run", 10, 7)
    write_best(folder / "run", Best(5, 0.75))
    (folder / "other/_capipe").mkdir(parents=True)
    (folder / "other/_capipe/config.json").write_text('{"half')
    view = overview(str(folder))
    text = told(view)
    assert list(view.artifacts) == ["shards", "captions"] and not view.complete
    assert "run: training, step 7/10, reward 0.320, 16.0 tokens a caption, no checkpoint yet" in text
    assert "  best checkpoint: step-000005 (validation accuracy 0.750)" in text
    assert "2.0 s a step, ETA 0:06" in text and "validation: plain 0.560" in text
    assert "other: " in text and "unreadable" in text
    found = json.loads(capipe("status", folder, "--json").stdout)
    assert found["artifacts"]["captions"]["shards"] == 3 and found["training"]["run"]["step"] == 7
    assert list(found["damaged"]) == ["other"] and found["complete"] is False


def test_one_artifact_keeps_its_own_json(folder: Path) -> None:
    found = json.loads(capipe("status", folder / "shards", "--json").stdout)
    assert found["complete"] is True and found["rows"] == {"ok": 20, "corrupt": 4}


def test_a_chain_in_order_with_stages_that_have_not_begun(folder: Path) -> None:
    stages = [
        StageState("images", "ingest", "shards", artifacts=["shards"], state="done", seconds=75.0),
        StageState("captions", "annotate", "captions", {"shards": "images"}, ["captions"], state="running"),
        StageState("quiz", "qa", "questions", {"shards": "images"}, ["questions/screened"], error=None),
        StageState("bad", "eval", "eval", {"shards": "images"}, [], state="failed", error="no such model"),
    ]
    save_chain(folder, ChainState("tiny", "2026-01-01T00:00:00Z", "", stages))
    text = told(overview(str(folder)))
    assert text.splitlines()[0].endswith("tiny, 1/4 stages done")
    order = [text.index(word) for word in ("images (ingest) in 1:15", "captions (annotate)", "quiz (qa)", "bad (eval)")]
    assert order == sorted(order) and "no such model" in text
    found = json.loads(capipe("status", folder, "--json").stdout)
    assert [stage["state"] for stage in found["chain"]["stages"]] == ["done", "running", "waiting", "failed"]
    (folder / "chain.json").write_text("{")
    assert "chain.json: not a chain's state" in told(overview(str(folder)))


def test_quarantine_is_told(folder: Path) -> None:
    Artifact.open(str(folder / "captions")).quarantine("00003", "failed three times")
    assert "shard 00003 quarantined: failed three times" in told(overview(str(folder)))


def test_live_ends_when_all_is_done_and_tells_each_change_once(folder: Path) -> None:
    looks: list[Overview] = []

    def look() -> Overview:
        if len(looks) == 2:
            write_captions(folder / "shards", folder / "captions")
        looks.append(overview(str(folder)))
        return looks[-1]

    out = io.StringIO()
    last = follow(look, 0.01, Console(file=out, width=200))
    assert last.complete and len(looks) == 3
    assert out.getvalue().count("shards: ingest, 4/4") == 1
    assert "captions: annotate, 3/4" in out.getvalue() and "captions: annotate, 4/4" in out.getvalue()


def test_a_training_log_that_is_being_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10, 4)
    with (run / "steps.jsonl").open("a") as file:
        file.write('not json\n{"step": 4, "rew')
    assert run_state(run).step == 4
    (run / "step-000010").mkdir()
    assert run_state(run).complete


def test_times_of_steps_are_read_where_they_are(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10, 4)
    assert (run_state(run).rate, run_state(run).eta) == (0.5, 12.0)
    (run / "times.jsonl").unlink()
    assert run_state(run).rate is None and run_state(run).step == 4
    entries = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    older = [{**entry, "seconds/rollout": 4.0} if "reward" in entry else entry for entry in entries]
    (run / "steps.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in older))
    assert run_state(run).rate == 0.25  # as runs logged them before


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not an artifact"):
        overview(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no artifact, training run or chain"):
        overview(str(tmp_path / "empty"))


def test_a_run_is_watched_while_it_is_written(folder: Path) -> None:
    """Every state between two writes of a commit can be read."""
    artifact = Artifact.create(
        str(folder / "new"), "annotate", {}, {"shards": str(folder / "shards"), "shards_total": 1}
    )
    assert "new: annotate, 0/1 shards committed, rows: none" in told(overview(str(folder)))
    with artifact.begin("00000", ANNOTATE) as made:
        made.write({"key": "a", "uid": None, "status": "ok", "error": None, "text": None, "captions": []})
        assert state(str(folder / "new")).shards == 0
        made.commit(rows_in=1, input_info={"digest": "d"})
    assert state(str(folder / "new")).complete
    artifact.close()
