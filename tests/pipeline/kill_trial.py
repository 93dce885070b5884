"""Kill any command at random moments, start it again each time, and compare every byte with a run that was left alone.

The test kills a few times; the long trial is a command:

    python -m tests.pipeline.kill_trial --kills 100 --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from capipe.models.tiny.world.corpus import write_corpus
from capipe.pipeline.inspect.verify import verify

from ..stages.exporting import VERSIONED
from .conftest import COMMAND, capipe
from .leftovers import Watched
from .training import quizzed

# Who is at work and since when; a summary writer's own files have times in their names.
NOT_COMPARED = {"lock", "guard", "times.jsonl", "tensorboard", "chain.json", ".chain.lock", *VERSIONED}
NO_ARTIFACTS = {"train", "run"}
FORMATS = ("webdataset", "parquet", "lance", "llava", "folder", "messages")
OUT = "out"
TINY = ("--engine", "transformers", "--concurrency", "8")


@dataclass
class Trial:
    """``seconds``: the longest until no process of a killed command was left."""

    command: str
    kills: int = 0
    cycles: int = 0
    differing: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def commands(data: Path) -> dict[str, list[object]]:
    """Every command that writes, without its --out, on what :func:`prepare` made."""
    shards, captions = data / "shards", data / "captions"
    annotate = ["annotate", "--shards", shards, "--model", "tiny/captioner", "--prompt", "short", "--max-tokens", 24]
    select = ["filter", "--shards", shards, "--captions", captions, "--clip", "tiny/clip", "--top", 0.5]
    export = ["export", shards, "--title", "Pictures", "--format"]
    return {
        "ingest": ["ingest", data / "corpus", "--shard-size", 8],
        "dedup": ["dedup", "--shards", shards],
        "embed": ["embed", "--shards", shards, "--clip", "tiny/clip"],
        "qa": ["qa", "--shards", shards, "--import", data / "quiz/set.jsonl", "--screen", "none"],
        "annotate": [*annotate, *TINY],
        "annotate --pack": [*annotate, *TINY, "--pack"],
        "filter": select,
        "filter --index": [*select, "--index", "--shard-size", 8],
        **{f"export {form}": [*export, form] for form in FORMATS},
        "export an index": ["export", data / "index/shards", "--title", "Pictures", "--format", "parquet"],
        "train": ["train", data / "recipe.yaml"],
        "run": ["run", data / "chain.yaml"],
    }


def prepare(data: Path, images: int, seed: int) -> None:
    """A corpus with shards, captions and a quiz, and the recipes of a training and of a chain."""
    write_corpus(data / "corpus", images, "heldout", seed)
    capipe("ingest", data / "corpus", "--out", data / "shards", "--shard-size", 8)
    quizzed(data / "quiz", 8, "train", seed)
    capipe(*commands(data)["annotate"], "--out", data / "captions")
    capipe(*commands(data)["filter --index"], "--out", data / "index")
    recipe = {
        "model": "tiny/captioner",
        "prompt": "Describe the image.",
        "data": {"shards": str(data / "quiz/shards"), "questions": str(data / "quiz/qa")},
        "rewards": [{"kind": "quiz", "engine": "transformers"}],
        "rollout": {"images": 4, "group": 3, "max_tokens": 24},
        "optimizer": {"lr": 1e-4, "warmup": 1},
        "preflight": False,
        "steps": 8,
        "save_every": 2,
    }
    (data / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    stages = {
        "pictures": {"stage": "render", "config": {"images": 200, "split": "heldout", "seed": 3}},
        "shards": {"stage": "ingest", "inputs": {"sources": "pictures"}, "config": {"shard-size": 8}},
        "marks": {"stage": "dedup", "inputs": {"shards": "shards"}},
        "final": {"stage": "export", "inputs": {"artifact": "shards"}, "config": {"title": "Pictures"}},
    }
    (data / "chain.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))


def kill_trial(data: Path, name: str, kills: int, seed: int) -> Trial:
    """Raises AssertionError where a run that nobody kills ends badly, or a process outlives its command for long."""
    command, rng, trial = commands(data)[name], random.Random(f"{seed}/{name}"), Trial(name)
    words = [*COMMAND, *map(str, command), "--out", OUT]  # which some files name, so it is the same for both
    alone, place = data / f"alone {name}", data / f"killed {name}"
    alone.mkdir()
    place.mkdir()
    started = time.monotonic()
    _whole(words, alone)
    seconds = time.monotonic() - started
    expected = contents(alone / OUT)
    while trial.kills < kills:
        if _killed(words, place, rng.uniform(0, seconds), rng.random() < 0.5, trial):
            continue
        _compare(expected, place / OUT, name, trial)  # it was done first
        shutil.rmtree(place / OUT)
    _whole(words, place)
    _compare(expected, place / OUT, name, trial)
    return trial


def _killed(command: Sequence[str], place: Path, moment: float, with_group: bool, trial: Trial) -> bool:
    """Kill it after ``moment`` seconds, alone or with its whole group; False if it was done before that."""
    with (place / "log").open("w+") as log:
        run = Watched(command, log, place)
        deadline = time.monotonic() + moment
        while run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if run.process.poll() is not None:
            assert run.process.returncode == 0, run.said
            return False
        (os.killpg if with_group else os.kill)(run.process.pid, signal.SIGKILL)
        run.process.wait()
        trial.seconds = max(trial.seconds, run.gone())
        trial.kills += 1
        return True


def _whole(command: Sequence[str], place: Path) -> None:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _compare(expected: Mapping[str, bytes], out: Path, name: str, trial: Trial) -> None:
    trial.cycles += 1
    found = contents(out)
    trial.differing += sorted(file for file in {*expected, *found} if expected.get(file) != found.get(file))
    if name not in NO_ARTIFACTS:
        trial.faults += [fault for place in artifacts(out) for fault in verify(str(place)).faults]


def artifacts(out: Path) -> list[Path]:
    return [path.parent.parent for path in out.rglob("_capipe/config.json")]


def contents(out: Path) -> dict[str, bytes]:
    """What is compared: all files but those that hold times, by their places."""
    found = {}
    for path in out.rglob("*"):
        parts = path.relative_to(out).parts
        if path.is_file() and not NOT_COMPARED & {*parts}:
            data = path.read_bytes()
            # Shards are committed in the order in which they are done.
            found["/".join(parts)] = b"".join(sorted(data.splitlines(True))) if path.name == "manifest.jsonl" else data
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100, help="over all commands")
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="these commands")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        prepare(data, given.images, given.seed)
        chosen = given.only or list(commands(data))
        for number, name in enumerate(chosen):
            kills = given.kills * (number + 1) // len(chosen) - given.kills * number // len(chosen)
            print(json.dumps(vars(kill_trial(data, name, kills, given.seed))), flush=True)


if __name__ == "__main__":
    main()
