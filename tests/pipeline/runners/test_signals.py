"""Signals end commands in one line, with an exit code of their own, and leave no process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capipe.models.tiny.world.corpus import write_corpus
from capipe.pipeline.runners import interrupts

from ..chains import written
from ..conftest import COMMAND, capipe, table
from ..leftovers import Watched
from ..training import same_state, weights

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
Run = Callable[..., Watched]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Run]:
    started: list[Watched] = []

    def run(*command: object) -> Watched:
        started.append(Watched([*COMMAND, *command], (tmp_path / f"log{len(started)}").open("w+")))
        return started[-1]

    yield run
    for each in started:
        each.kill_all()


def until(run: Watched, seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not seen():
        assert run.process.poll() is None and time.monotonic() < deadline, run.said
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_during_imports(
    watched: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    """Held up in one that takes a minute."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/typer.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "slow"), os.environ.get("PYTHONPATH", "")]))
    run = watched("ingest", tmp_path, "--out", tmp_path / "out")
    until(run, lambda: "importing" in run.said)
    run.process.send_signal(number)
    assert run.process.wait(30) == code
    assert run.said.splitlines() == ["importing", "capipe: stopped before it had begun"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
@pytest.mark.parametrize(("number", "code"), [*SIGNALS, (signal.SIGQUIT, -signal.SIGQUIT)])
def test_during_work(watched: Run, tmp_path: Path, number: signal.Signals, code: int, to_all: bool) -> None:
    """To the command alone, and to all its processes, as terminals and schedulers do it."""
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 1200, "heldout", 3)
    out, command = tmp_path / "out", ["ingest", corpus, "--shard-size", 10]
    run = watched(*command, "--out", out)
    manifest = out / "_capipe/manifest.jsonl"
    until(run, lambda: manifest.exists() and manifest.stat().st_size > 0)
    (os.killpg if to_all else os.kill)(run.process.pid, number)
    assert run.process.wait(60) == code
    run.gone()
    if number is not signal.SIGQUIT:
        assert run.said.splitlines()[-1] == "stopped; run the same command to go on"
        assert "Traceback" not in run.said
    capipe(*command, "--out", out)
    assert len(table(out)) == 1200


def test_a_command_that_cannot_drain_ends_where_it_is() -> None:
    """What a signal raises is told by the entry point, whatever the command was about."""
    code = (
        "import os, signal, sys; from capipe.pipeline import cli, __main__\n"
        "@cli.app.command()\n"
        "def wait() -> None:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['capipe', 'wait']; __main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 143 and done.stderr.splitlines() == [f"capipe: {interrupts.STOPPED}"]


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As `nohup` starts a command."""
    code = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from capipe.pipeline.runners.interrupts import raise_on_signals\n"
        "raise_on_signals(); os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('goes on')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "goes on\n"


def test_what_a_scripts_shell_starts_hears_an_interrupt() -> None:
    """It is started with `&`, and so with SIGINT ignored; a chain passes that to the command it is to stop."""
    code = (
        "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from capipe.pipeline.runners.interrupts import begin; begin(); os.kill(os.getpid(), signal.SIGINT)\n"
        "print('goes on')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "processes"), [*((*each, 0) for each in SIGNALS), (signal.SIGTERM, 143, 2)])
def test_training_ends_with_a_checkpoint(
    watched: Run, recipe: Path, tmp_path: Path, number: signal.Signals, code: int, processes: int
) -> None:
    """Of a step that is none of `save_every`; going on, it comes to the weights of a run that nobody stopped.

    Processes that sample captions get the signal, too, and are gone with the run.
    """
    sets = ("steps=6", "save_every=6", f"rollout.processes={processes}")
    out, command = tmp_path / "run", ["train", recipe, *(word for each in sets for word in ("--set", each))]
    run = watched(*command, "--out", out)
    until(run, lambda: "step 1/6" in run.said)
    os.killpg(run.process.pid, number)
    assert run.process.wait(120) == code
    run.gone()
    found = re.search(r"^stopped after step ([2-5]) of 6; run the same command to go on$", run.said, re.MULTILINE)
    last = run.said.splitlines()[-1]
    assert found and last == f"checkpoint: {out / f'step-00000{found[1]}'}" and "Traceback" not in run.said
    capipe(*command, "--out", out)
    capipe(*command, "--out", tmp_path / "whole")
    assert (out / "captions.jsonl").read_bytes() == (tmp_path / "whole/captions.jsonl").read_bytes()
    assert same_state(out / "step-000006", tmp_path / "whole/step-000006")
    assert weights(out / "step-000006") == weights(tmp_path / "whole/step-000006")


@pytest.mark.slow
def test_a_chain_passes_it_on(watched: Run, tmp_path: Path) -> None:
    recipe = written(tmp_path)
    run = watched("run", recipe, "--out", tmp_path / "out", "--set", "stages.pictures.config.images=3000")
    until(run, lambda: "== 2/4" in run.said)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(60) == 143
    run.gone()
    assert run.said.splitlines()[-1] == "stopped; run the same command to go on" and "Traceback" not in run.said
