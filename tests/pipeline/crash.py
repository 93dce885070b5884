"""Kill an annotate run at random moments, resume it each time, and compare with a run that was left alone.

The test runs a short version; the long one is a command:

    python -m tests.pipeline.crash --kills 20 --shards 40 --images 250 --engine vllm
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from capipe.models.tiny.world.corpus import write_corpus
from capipe.pipeline.inspect.verify import verify

_COMMAND = [sys.executable, "-m", "capipe.pipeline"]


@dataclass
class Trial:
    """What came of it. ``requests``: made over all tries; ``requests_alone``: by the run that was left alone."""

    kills: int
    rows: int
    requests: int
    requests_alone: int
    equal: bool
    faults: list[str]
    leftovers: list[str]


class _Seconds(NamedTuple):
    """What a run takes here: until its first request, and from then on."""

    startup: float
    work: float


def crash_trial(
    folder: Path, *, kills: int, shards: int, images: int, engine: str, concurrency: int, seed: int
) -> Trial:
    """Raises CalledProcessError where a run that nobody kills ends badly."""
    rng = random.Random(seed)
    write_corpus(folder / "corpus", shards * images, "heldout", seed)
    _run("ingest", folder / "corpus", "--out", folder / "shards", "--shard-size", images)
    options = ["annotate", "--shards", folder / "shards", "--model", "tiny/captioner", "--engine", engine]
    options += ["--prompt", "short", "--max-tokens", 64, "--concurrency", concurrency]
    alone = _left_alone([*options, "--out", folder / "alone", "--trace", folder / "alone.trace"], folder)
    again = [*options, "--out", folder / "killed", "--trace", folder / "killed.trace"]
    killed = 0
    while killed < kills:
        if not _killed(again, rng, alone, kills, folder):
            break
        killed += 1
    _run(*again)
    return Trial(
        kills=killed,
        rows=shards * images,
        requests=_lines(folder / "killed.trace"),
        requests_alone=_lines(folder / "alone.trace"),
        equal=_rows(folder / "alone") == _rows(folder / "killed"),
        faults=verify(str(folder / "killed")).faults,
        leftovers=_leftovers(folder / "killed"),
    )


def _left_alone(command: list[Any], folder: Path) -> _Seconds:
    """Let a run end by itself."""
    began = time.monotonic()
    process = subprocess.Popen([*_COMMAND, *map(str, command)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not _lines(folder / "alone.trace"):
        time.sleep(0.01)
    working = time.monotonic()
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    return _Seconds(working - began, time.monotonic() - working)


def _killed(command: list[Any], rng: random.Random, alone: _Seconds, kills: int, folder: Path) -> bool:
    """Start, kill the process group at a random moment; False if it was done before that.

    One moment in five lies anywhere in the start-up; the others in the work, short enough that it outlasts all kills.
    """
    before = _lines(folder / "killed.trace")
    process = subprocess.Popen([*_COMMAND, *map(str, command)], start_new_session=True, stderr=subprocess.DEVNULL)
    early = rng.random() < 0.2
    deadline = time.monotonic() + (rng.uniform(0, alone.startup) if early else 10 * alone.startup + 60)
    while not early and process.poll() is None and _lines(folder / "killed.trace") == before:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    if not early:
        deadline = time.monotonic() + rng.uniform(0, 0.8 * alone.work / kills)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def _run(*arguments: Any) -> None:
    subprocess.run([*_COMMAND, *map(str, arguments)], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def _leftovers(folder: Path) -> list[str]:
    """Files that are neither of a shard nor the artifact's own."""
    known = {"config.json", "manifest.jsonl", "times.jsonl", "lock"}
    return [p.name for p in (folder / "_capipe").rglob("*") if p.is_file() and p.name not in known]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        trial = crash_trial(Path(folder), **options)
    print(json.dumps({**asdict(trial), "ratio": round(trial.requests / trial.requests_alone, 3)}))


if __name__ == "__main__":
    main()
