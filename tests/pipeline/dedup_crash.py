"""Kill a dedup run at random moments, resume it each time, and compare with a run that was left alone.

The test runs a short version; the long one is a command:

    python -m tests.pipeline.dedup_crash --kills 10 --shards 60 --images 50
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capipe.manifests.files.tar import TarWriter
from capipe.models.tiny.world.corpus import samples
from capipe.pipeline.inspect.verify import verify

from .killing import committed, run_killed

_COMMAND = [sys.executable, "-m", "capipe.pipeline"]
_ARTIFACTS = ("hashes", "against", "marked")


@dataclass
class Trial:
    """What came of it. ``moments``: shards committed, of all three artifacts, when each kill came."""

    kills: int
    moments: list[int]
    shards: int
    statuses: dict[str, int]
    equal: bool
    faults: list[str]
    leftovers: list[str]


def crash_trial(folder: Path, *, kills: int, shards: int, images: int, seed: int) -> Trial:
    """Raises CalledProcessError where a run that nobody kills ends badly."""
    reference = _written(folder, shards, images, seed)
    options = ["dedup", "--shards", folder / "in", "--against", reference, "--workers", 1]
    alone, killed = folder / "alone", folder / "killed"
    _run(*options, "--out", alone)
    total = committed(alone)
    moments = run_killed([*_COMMAND, *options, "--out", killed], killed, total, kills, seed)
    report = verify(str(killed / "marked"))
    return Trial(
        kills=len(moments),
        moments=moments,
        shards=total,
        statuses=dict(report.rows),
        equal=all(contents(alone / name) == contents(killed / name) for name in _ARTIFACTS),
        faults=[fault for name in _ARTIFACTS for fault in verify(str(killed / name)).faults],
        leftovers=[name for artifact in _ARTIFACTS for name in leftovers(killed / artifact)],
    )


def _written(folder: Path, shards: int, images: int, seed: int) -> Path:
    """Shards in which every picture comes several times, and a reference set that holds one of them."""
    pictures = [sample.image for sample in samples(max(2, shards * images // 4), "heldout", seed)]
    rng = random.Random(seed)
    (folder / "in").mkdir()
    (folder / "reference").mkdir()
    for number in range(shards):
        with (folder / "in" / f"{number:05}.tar").open("wb") as file:
            writer = TarWriter(file)
            for index in range(images):
                writer.add(f"{number:05}{index:04}.jpg", rng.choice(pictures))
            writer.finish()
    (folder / "reference/a.jpg").write_bytes(pictures[0])
    return folder / "reference"


def _run(*arguments: Any) -> None:
    quiet = subprocess.DEVNULL
    subprocess.run([*_COMMAND, *map(str, arguments)], check=True, stderr=quiet, stdout=quiet)


def contents(folder: Path) -> dict[str, bytes]:
    """The files that say nothing of when they were written, and the fingerprint."""
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}
    config = json.loads((folder / "_capipe/config.json").read_text())
    return {**found, "fingerprint": config["fingerprint"].encode()}


def leftovers(folder: Path) -> list[str]:
    known = {"config.json", "manifest.jsonl", "times.jsonl", "lock"}
    return [path.name for path in (folder / "_capipe").rglob("*") if path.is_file() and path.name not in known]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--shards", type=int, default=60)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asdict(crash_trial(Path(folder), **options))))


if __name__ == "__main__":
    main()
