"""Text of data never makes a terminal do anything, wherever it is shown."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

import capipe
from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import INGEST
from capipe.manifests.status import Status
from capipe.pipeline import cli
from capipe.pipeline.commands.doctor import Check
from capipe.pipeline.commands.run_job import conclude, first_error, print_state
from capipe.pipeline.inspect.status import state
from capipe.pipeline.inspect.status_view import follow, overview
from capipe.pipeline.runners.messages import Event, Note, ShardFailed
from capipe.pipeline.runners.progress import Progress
from capipe.terminal import escape_logs, escaped, print_err, print_line

from .conftest import capipe as command
from .conftest import one_line
from .looking import write_captions, write_images

EVIL = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b1m[bold red]\r\u202egnp\u2028\x7f"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b1m[bold red]\r\u202egnp\u2028\x7f"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028-\u202e\u2066-\u2069]")
ROOT = Path(capipe.__file__).parent


def plain(text: str) -> str:
    """The text, of which a terminal obeys nothing but line ends."""
    assert OBEYED.search(text) is None, repr(text)
    return text


def test_letters_of_all_scripts_stay() -> None:
    for text in ("naïve façade", "日本語　全角", "ÄÖ ß", "שלום", "👩‍👩‍👧", "a\u0301", "x = y", "\udcff"):
        assert escaped(text) == text
    assert escaped("a\nb\tc") == r"a\nb\tc" and escaped(EVIL) == SHOWN


def test_the_reason_of_a_quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = write_images(tmp_path / "a", [2, 2], only=1)
    reason = f"first\n00007: clean {EVIL}"
    artifact.quarantine("00001", reason)
    for asked in (tmp_path, tmp_path / "a"):
        status = command("status", asked).stdout
        assert rf"quarantined: first\n00007: clean {SHOWN}" in plain(status)
    assert SHOWN in plain(command("verify", tmp_path / "a").stdout)
    found = json.loads(command("status", tmp_path / "a", "--json").stdout)
    assert found["quarantined"] == {"00001": reason}, "JSON is for programs"
    for terminal in (True, False):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, color_system=None, width=400, legacy_windows=False)
        monkeypatch.setattr("time.sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with contextlib.suppress(KeyboardInterrupt):
            follow(lambda: overview(str(tmp_path / "a")), 0.1, console)
        assert SHOWN in screen.getvalue() and "\x1b]0" not in screen.getvalue() and "\x1b[2J" not in screen.getvalue()


def test_the_name_of_a_shard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = state(write_images(tmp_path / "a", [2]).url)
    print_state(f"a{EVIL}", replace(found, quarantined={EVIL: "reason"}))
    said = plain(capfd.readouterr().out)
    assert said.startswith(f"a{SHOWN}: ingest") and f"shard {SHOWN} quarantined: reason\n" in said


def test_the_name_of_a_model_and_a_reason_in_a_configuration(tmp_path: Path) -> None:
    write_images(tmp_path / "shards", [2])
    write_captions(tmp_path / "shards", tmp_path / "captions", model=EVIL)
    plain(command("status", tmp_path).stdout)
    path = tmp_path / "captions/_capipe/config.json"
    path.write_text(path.read_text().replace('"fingerprint"', json.dumps(EVIL), 1))
    status = command("status", tmp_path)
    assert "captions: " in plain(status.stdout + status.stderr)
    refused = command("status", tmp_path / "captions", code=2)
    plain(one_line(refused) + refused.stdout)


def test_the_error_of_a_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = Artifact.create(str(tmp_path / "a"), "ingest", {"x": 1}, {"sources": ["x"], "shards_total": 1})
    with artifact.begin("00000", INGEST, tar=True) as made:
        made.write({"key": "k", "uid": None, "status": "read_error", "error": EVIL})
        made.commit(rows_in=1, input_info={"digest": "0" * 64})
    artifact.close()
    assert first_error(str(tmp_path / "a"), Status.READ_ERROR)
    conclude(str(tmp_path / "a"), False, EVIL)
    said = capfd.readouterr()
    assert "(the first: " in plain(said.err) and r"\x1b]0;owned" in said.err and SHOWN in said.err
    plain(said.out)


def test_what_is_told_while_a_run_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = [Note(EVIL), ShardFailed("00000", f"Error\n00001: clean {EVIL}")]
    for terminal in (False, True):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, color_system=None, width=400)
        progress = Progress("annotate", 2)
        with progress.shown(console) as report:
            for event in events:
                report(event)
            console.print(progress.panel())
        assert "\x1b]0" not in screen.getvalue() and "\x1b[31m" not in screen.getvalue()
        assert SHOWN in screen.getvalue()
    lines = plain(capfd.readouterr().err).split("\n")
    assert lines[0] == f"annotate: {SHOWN}" and lines[2] == f"    00001: clean {SHOWN}"


def test_the_line_that_a_command_ends_with(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise BadInput(f"{EVIL}\ncapipe: all is well")

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit):
        cli.main()
    assert plain(capfd.readouterr().err) == f"capipe: {SHOWN}\n    capipe: all is well\n"


def test_doctor_takes_nothing_for_markup(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("capipe.pipeline.commands.doctor.run_checks", lambda: [Check("[red]gpu[/red]", EVIL)])
    with pytest.raises(typer.Exit):
        cli.doctor()
    said = plain(capfd.readouterr().out)
    assert SHOWN in re.sub(r"\s+", " ", said) and "[red]gpu[/red]" in said


def test_what_modules_log_and_errors_that_nobody_catches() -> None:
    """In the command's own process, and in the workers that it starts."""
    body = f"""
import logging
from capipe.models.worker_process import Worker
from capipe.terminal import escape_logs
escape_logs()
logging.getLogger("capipe.x").warning("%s is odd", {EVIL!r})
worker = Worker(logging.getLogger("capipe.y").error)
worker.wait_ready(); worker.send({EVIL!r} + "of a worker"); worker.recv()
raise ValueError({EVIL!r})
"""
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=120)
    said = plain(done.stderr)
    assert f"{SHOWN} is odd\n" in said and f"{SHOWN}of a worker\n" in said and f"ValueError: {SHOWN}\n" in said


def test_there_is_one_way_to_the_terminal() -> None:
    """Nothing of the command line prints by itself but JSON, which has no controls, and rich's tables of safe texts."""
    found: list[str] = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _name(node.func) in ("print", "echo", "secho", "write"):
                found.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    direct = [each for each in found if re.search(r": (print|.*sys\.std(out|err)\.write|typer\.s?echo)\(", each)]
    assert direct == ["pipeline/commands/inspect.py: print(json.dumps(result.as_json(), indent=1))"]
    assert any("console.print(" in each for each in found), "the search sees what it looks for"


def _name(function: Any) -> str:
    return str(getattr(function, "id", getattr(function, "attr", "")))


def test_lines_go_where_they_should(capfd: pytest.CaptureFixture[str]) -> None:
    handler, hook = logging.lastResort, sys.excepthook
    try:
        escape_logs()
        print_line(f"a {EVIL}")
        print_err(f"b\n{EVIL}\n")
        logging.getLogger("capipe.of.this.test").warning("c %s", "\x1b[1m")
    finally:
        logging.lastResort, sys.excepthook = handler, hook
    said = capfd.readouterr()
    assert said.out == f"a {SHOWN}\n" and said.err.startswith(f"b\n    {SHOWN}\n")
