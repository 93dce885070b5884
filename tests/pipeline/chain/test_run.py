"""Chains that run for real, without any model: what is done again after a change, a kill, a Ctrl-C, a fault."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.pipeline.chain.command import show_plan
from capipe.pipeline.chain.lock import LOCK, locked
from capipe.pipeline.inspect.chain_state import FILE, load_chain

from ...conftest import photo
from ..chains import PLAIN, chain_of, verdicts, written
from ..conftest import COMMAND, CaptionServer, capipe, one_line, table
from ..killing import run_killed

CAPTIONED: dict[str, Any] = {
    **{name: PLAIN[name] for name in ("pictures", "shards")},
    "captions": {
        "stage": "annotate",
        "inputs": {"shards": "shards"},
        "config": {"model": "m", "concurrency": 1, "max-attempts": 1, "pack": True},
    },
    "final": {"stage": "export", "inputs": {"artifact": "captions"}},
}


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain chain, run to its end."""
    folder = tmp_path_factory.mktemp("ran")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # rows name their pictures' paths: these are to be the same ones everywhere
        capipe("run", written(folder), "--out", "out")
    return folder / "out"


@pytest.fixture
def done(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, relative to where the test is."""
    shutil.copytree(ran, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return Path("out")


def run(out: Path, *sets: str, stages: dict[str, Any] = PLAIN, code: int = 0) -> subprocess.CompletedProcess[str]:
    words = [word for each in sets for word in ("--set", each)]
    return capipe("run", written(out.parent, stages), "--out", out, *words, code=code)


def commands(finished: subprocess.CompletedProcess[str]) -> list[str]:
    """The stages' commands that a run started."""
    return [line.split()[2] for line in finished.stderr.splitlines() if line.startswith("$ capipe ")]


def states(out: Path) -> dict[str, str]:
    state = load_chain(out)
    assert state is not None
    return {stage.name: stage.state for stage in state.stages}


def files(out: Path) -> dict[str, tuple[int, int]]:
    """Every file but the chain's own: when it was written, and its inode."""
    found = {str(path.relative_to(out)): path.stat() for path in out.rglob("*") if path.is_file()}
    return {n: (s.st_mtime_ns, s.st_ino) for n, s in found.items() if "/" in n and not n.endswith("lock")}


def test_the_state_file_tells_what_was_done(ran: Path) -> None:
    told = json.loads((ran / FILE).read_text())
    assert (told["format"], told["recipe"]) == (1, "recipe")
    stages = {stage["name"]: stage for stage in told["stages"]}
    assert list(stages) == list(PLAIN) and {each["state"] for each in stages.values()} == {"done"}
    marks = stages["marks"]
    assert (marks["stage"], marks["out"], marks["inputs"]) == ("dedup", "marks", {"shards": "shards"})
    assert marks["artifacts"] == ["marks/hashes", "marks/marked"] and marks["error"] is None and marks["seconds"] > 0
    assert marks["arguments"] == ["dedup", "--shards", "out/shards", "--out", "out/marks"]
    assert stages["shards"]["config"] == {"shard-size": 4}
    assert len({stage["digest"] for stage in stages.values()}) == 4
    assert len(table(ran / "shards")) == 8


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("stages.pictures.config.seed=4", {"pictures", "shards", "marks", "final"}),
        ("stages.shards.config.shard-size=2", {"shards", "marks", "final"}),
        ("stages.marks.config.radius=5", {"marks"}),
        ("stages.final.config.title=Other", {"final"}),
        ("stages.shards.config.workers=1", set()),
        ("stages.final.rate={per_device: 3, source: here}", set()),
    ],
)
def test_an_edit_is_for_what_hangs_on_it_alone(done: Path, override: str, again: set[str]) -> None:
    found = verdicts(chain_of(done.parent, override), done)
    assert {name for name, verdict in found.items() if verdict == "changed"} == again
    assert {name for name, verdict in found.items() if verdict == "done"} == set(PLAIN) - again
    assert verdicts(chain_of(done.parent, override), done.resolve()) == found  # wherever it lies


@pytest.mark.slow
def test_what_did_not_change_is_not_touched(done: Path) -> None:
    before = files(done)
    assert commands(run(done)) == [] and files(done) == before
    assert commands(run(done, "stages.marks.config.radius=5")) == ["dedup"]
    after = files(done)
    changed = {name for name in after if after[name] != before.get(name) and not name.endswith("config.json")}
    assert changed and all(name.startswith("marks/marked/") for name in changed)  # hashes are what they were
    before = after
    assert commands(run(done, "stages.marks.config.radius=5", "stages.final.config.title=Other")) == ["export"]
    assert "Other" in (done / "final/README.md").read_text()
    after = files(done)
    assert {name: after[name] for name in after if name.endswith(".tar")} == {
        name: before[name] for name in before if name.endswith(".tar")
    }


def test_an_edit_is_done_again_with_what_hangs_on_it(done: Path) -> None:
    finished = run(done, "stages.shards.config.shard-size=2")
    assert (
        commands(finished) == ["ingest", "dedup", "export"]
        and "shards (ingest): changed, shard-size" in finished.stderr
    )
    assert len(list((done / "final").glob("*.tar"))) == 4 and set(states(done).values()) == {"done"}
    for place in ("shards", "marks/hashes", "marks/marked", "final"):
        assert "clean" in capipe("verify", done / place).stdout


@pytest.mark.slow
def test_new_data_from_outside_is_noticed(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        (photos / f"{number}.jpg").write_bytes(photo(number))
    stages = {**PLAIN, "shards": {"stage": "ingest", "inputs": {"sources": {"path": str(photos)}}}}
    del stages["pictures"]
    out = tmp_path / "out"
    assert commands(run(out, stages=stages)) == ["ingest", "dedup", "export"]
    (photos / "3.jpg").write_bytes(photo(3))
    assert set(verdicts(chain_of(tmp_path, stages=stages), out).values()) == {"changed"}
    assert commands(run(out, stages=stages)) == ["ingest", "dedup", "export"] and len(table(out / "final")) == 4


@pytest.mark.slow
def test_an_edited_manifest_is_refused(done: Path) -> None:
    manifest = done / "shards/_capipe/manifest.jsonl"
    text = manifest.read_text()
    edited = [json.loads(line.replace('"ok":4', '"ok":3')) for line in text.splitlines()]
    for line in edited:
        del line["checksum"]  # as lines of older versions have none
    manifest.write_text("".join(json.dumps(line) + "\n" for line in edited))
    before = files(done)
    refused = one_line(run(done, code=2))
    assert "not what stage shards made, and not sound" in refused and f"remove {done}/shards" in refused
    manifest.write_text("nonsense\n" + text)
    assert "manifest.jsonl:1: not a manifest line" in one_line(run(done, code=2))
    manifest.write_text(text)
    assert {name for name, when in files(done).items() if when != before[name]} <= {"shards/_capipe/manifest.jsonl"}
    shutil.rmtree(done / "shards")  # the mend
    assert commands(run(done)) == ["ingest"]  # and it holds what it held, so nothing else has to be done again


@pytest.mark.slow
def test_an_artifact_made_anew_by_hand_is_taken_as_it_is(done: Path) -> None:
    capipe("ingest", done / "pictures", "--out", done / "shards", "--shard-size", 2, "--fresh")
    finished = run(done)
    assert "changed since stage shards was done, but sound" in finished.stderr
    assert commands(finished) == ["dedup", "export"] and len(list((done / "final").glob("*.tar"))) == 4
    assert commands(run(done)) == []


@pytest.mark.slow
def test_what_the_chain_did_not_make_is_not_touched(done: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "new/final"
    theirs.mkdir(parents=True)
    (theirs / "notes").write_text("mine")
    assert "final: holds something that this chain did not make" in one_line(run(tmp_path / "new", code=2))
    assert (theirs / "notes").read_text() == "mine" and [
        p.name for p in (tmp_path / "new").iterdir() if p.is_dir()
    ] == ["final"]
    (done / FILE).write_text("{")
    assert "chain.json: not a chain's state" in one_line(run(done, code=2))
    (done / FILE).unlink()  # without it, none of the folders is known
    assert "this chain did not make" in one_line(run(done, code=2))


@pytest.mark.slow
def test_a_plan_tells_rows_and_cost(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = chain_of(done.parent, "stages.marks.config.radius=5")
    before = files(done)
    show_plan(chain, done, load_chain(done), [], print)
    told = capsys.readouterr().out
    assert "2/4 shards: ingest, done; 8 rows\n" in told
    assert "3/4 marks: dedup, changed (radius); 8 rows; 8 / " in told and "measured here, start included" in told
    assert f"$ capipe dedup --shards {done}/shards --radius 5 --out {done}/marks" in told
    assert "to do: 1 of 4 stages" in told
    show_plan(chain_of(done.parent), done, load_chain(done), [], print)
    assert "nothing to do" in capsys.readouterr().out and files(done) == before
    rate = "stages.{}.rate={{per_device: 0.001, devices: 8, source: a guess}}"
    guessed = chain_of(done.parent, rate.format("marks"), rate.format("final"))
    show_plan(guessed, done.parent / "new", None, [], print)
    told = capsys.readouterr().out
    assert "8 / 0.008 a second = 16.7 min on 8 GPUs, 2.2 GPU-hours; a guess" in told
    assert "33.3 min, 4.4 GPU-hours" in told and "cost unknown of: pictures, shards" in told


@pytest.mark.slow
def test_kills_cost_nothing_but_time(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("out")
    kills = run_killed([*COMMAND, "run", written(out.parent), "--out", out], out, total=8, kills=4, seed=5)
    assert kills and set(states(out).values()) == {"done"}
    for path in sorted(ran.glob("final/0*")):
        if path.suffix in (".tar", ".parquet"):
            assert path.read_bytes() == (out / "final" / path.name).read_bytes()
    assert commands(run(out)) == []


def test_a_killed_run_is_waited_for_and_one_at_work_is_not(tmp_path: Path) -> None:
    said: list[str] = []
    refused = pytest.raises(BadInput, match=r"another capipe run .* is at work")
    with locked(tmp_path, said.append), refused, locked(tmp_path, said.append):
        raise AssertionError("two at once")
    handle = os.open(tmp_path / LOCK, os.O_RDWR)  # as inherited by a command whose run was killed
    fcntl.flock(handle, fcntl.LOCK_EX)
    dead = subprocess.Popen(["true"])
    dead.wait()
    os.pwrite(handle, f"{dead.pid}\n".encode(), 0)
    os.ftruncate(handle, len(f"{dead.pid}\n"))
    ends = subprocess.Popen(["sleep", "1"], pass_fds=(handle,))
    os.close(handle)
    with locked(tmp_path, said.append):
        assert ends.poll() is not None or ends.wait(5) == 0
    assert len(said) == 1 and "is still ending" in said[0]


def start(out: Path, stages: dict[str, Any]) -> subprocess.Popen[str]:
    command = [*COMMAND, "run", str(written(out.parent, stages)), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def served(url: str) -> dict[str, Any]:
    captions = CAPTIONED["captions"]
    return {**CAPTIONED, "captions": {**captions, "config": {**captions["config"], "engine": url}}}


@pytest.mark.slow
def test_ctrl_c_drains_the_stage_and_the_same_command_goes_on(tmp_path: Path, server: CaptionServer) -> None:
    out = tmp_path / "out"
    many = {**PLAIN["pictures"], "config": {**PLAIN["pictures"]["config"], "images": 40}}  # more than are begun at once
    stages = {**served(server.url), "pictures": many}

    heard = threading.Event()

    def slow(number: int, image: bytes) -> int:
        if number > 2:
            heard.wait(60)  # however slow the machine is, the signal finds some in the engine
        return 200

    server.fails = slow
    process = start(out, stages)
    while server.requests < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    threading.Timer(3, heard.set).start()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; run the same command to go on" in told and "Traceback" not in told
    assert states(out) == {"pictures": "done", "shards": "done", "captions": "stopped", "final": "waiting"}
    assert verdicts(chain_of(tmp_path, stages=stages), out)["captions"] == "goes on"
    asked = server.requests
    assert asked < 40
    finished = run(out, stages=stages)
    assert commands(finished) == ["annotate", "export"] and set(states(out).values()) == {"done"}
    assert server.requests == 40  # what was captioned before was not asked again


@pytest.mark.slow
def test_a_failed_stage_is_told_and_tried_again(tmp_path: Path, server: CaptionServer) -> None:
    out, stages = tmp_path / "out", served(server.url)
    server.fails = lambda number, image: 400 if number == 3 else 200
    finished = run(out, stages=stages, code=1)
    assert "capipe: stage captions failed (exit code 1): rows or shards of it are to be tried again" in finished.stderr
    assert commands(finished)[-1] == "annotate"
    assert states(out) == {"pictures": "done", "shards": "done", "captions": "failed", "final": "waiting"}
    again = run(out, stages=stages)
    assert commands(again) == ["annotate", "export"] and "--retry" in again.stderr
    assert {row["status"] for row in table(out / "captions")} == {"ok"} and server.requests == 9
    dead = served("http://127.0.0.1:9")
    failed = run(tmp_path / "dead", stages=dead, code=2)
    state = load_chain(tmp_path / "dead")
    assert (
        state is not None
        and "127.0.0.1:9" in str(state.stages[2].error)
        and str(state.stages[2].error) in failed.stderr
    )
