"""`kill -9` of a selection: resumed, it ends in the same bytes, whatever it was doing."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from capipe.pipeline.inspect.verify import verify

from ..stages.scored import foreign_shards, write_scores
from .conftest import COMMAND
from .killing import committed, run_killed

# The n-th time that something becomes visible (a rename, a manifest line) is where a process dies. Each is a fork
# of one that has imported everything and done nothing yet. Prints how often it died, and how it ended.
_DIES = """
import itertools, os, signal
from pathlib import Path
from capipe.manifests import manifest
from capipe.manifests.files import storage
from capipe.pipeline.jobs import select
from capipe.pipeline.report import filter
from capipe.pipeline.cli import main
def dying(function):
    def called(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return called
storage.Folder.publish = dying(storage.Folder.publish)
manifest.append = dying(manifest.append)
kills = 0
for left in itertools.cycle(range(1, 7)):  # a shard is four steps: in six, one at least is done and one under way
    child = os.fork()
    if child == 0:
        main()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != -signal.SIGKILL:
        break
    kills += 1
    if Path("killed/shards/_capipe/uids.npy").exists():  # it comes after the last shard
        alone, killed = (len(manifest.read(storage.Folder(f"{Path.cwd()}/{o}/shards"))) for o in ("alone", "killed"))
        assert alone == killed
print("kills", kills, "code", code)
"""


def contents(out: Path) -> dict[str, str]:
    """Digests of all that a selection makes, but for the figures of time."""
    made = [*out.glob("*.tar"), *out.glob("*.parquet"), out / "_capipe/uids.npy", out / "_capipe/report.html"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made}


def leftovers(out: Path) -> set[str]:
    known = {"config.json", "manifest.jsonl", "times.jsonl", "lock", "uids.npy", "report.html"}
    return {path.name for path in (out / "_capipe").rglob("*") if path.is_file()} - known


def options(folder: Path, out: str, *more: object) -> list[str]:
    asked = ["filter", "--shards", folder / "theirs", "--scores", folder / "scores", "--top", 0.6, "--shard-size", 12]
    return [str(part) for part in [*asked, "--out", folder / out, *more]]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--index"]])
def test_killed_at_every_step(tmp_path: Path, more: list[str]) -> None:
    write_scores(foreign_shards(tmp_path / "theirs", [15] * 3), tmp_path / "scores")
    subprocess.run([*COMMAND, *options(tmp_path, "alone", "--workers", 0, *more)], check=True, capture_output=True)
    command = [sys.executable, "-c", _DIES, *options(tmp_path, "killed", "--workers", 0, *more)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    kills, code = re.findall(r"kills (\d+) code (\d+)", done.stdout)[0]
    assert int(kills) >= (5 if more else 10) and code == "0"  # without a tar a shard has a step less
    assert contents(tmp_path / "killed/shards") == contents(tmp_path / "alone/shards")
    assert verify(str(tmp_path / "killed/shards")).faults == [] and not leftovers(tmp_path / "killed/shards")


def test_killed_at_random_moments(tmp_path: Path, kills: Callable[[int], int]) -> None:
    """With two processes copying."""
    write_scores(foreign_shards(tmp_path / "theirs", [100] * 12), tmp_path / "scores")
    command = [*COMMAND, *options(tmp_path, "alone", "--workers", 2)]
    subprocess.run(command, check=True, capture_output=True)
    command[-3] = str(tmp_path / "killed")
    killed = tmp_path / "killed"
    moments = run_killed(command, killed, committed(tmp_path / "alone"), kills=kills(6), seed=0, within=0.1)
    assert len(moments) >= kills(6) // 2
    assert contents(tmp_path / "killed/shards") == contents(tmp_path / "alone/shards")
    assert verify(str(tmp_path / "killed/shards")).faults == [] and not leftovers(tmp_path / "killed/shards")
