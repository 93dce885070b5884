"""What Ray costs: `capipe annotate` under the Ray runner against the local one. (Bound: 10 %.)

The whole command with the bundled captioner over the same shards, one worker on each side, taking turns. ``ratio`` is
Ray's seconds ÷ the local runner's from the engine being ready to the last commit: what the models and the processes of
a local cluster take to start is left out, since it does not grow with the input, and is reported beside it (``start``:
the other seconds of each command). The cluster's own processes run on the same cores meanwhile, so what they take is in
the ratio. That both made the same bytes is checked in every round.

    python bench/ray_overhead.py [--shards 20] [--images 100] [--rounds 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))

from _common import alternate, quotient, report, version
from _corpus import rendered_shards
from _runs import working_seconds

SIDES = {"local": ["--runner", "local", "--gpus", "none"], "ray": ["--runner", "ray", "--ray-workers", "1"]}


def run(shards: Path, out: Path, engine: str, side: str) -> tuple[float, float]:
    """Seconds from the engine being ready to the last commit, and all other seconds of the command."""
    command = [sys.executable, "-m", "capipe.pipeline", "annotate", "--shards", str(shards), "--out", str(out)]
    command += ["--model", "tiny/captioner", "--engine", engine, "--prompt", "short", "--max-tokens", "100"]
    command += ["--decode-workers", "1", *SIDES[side]]
    return working_seconds(command, out, RAY_TMPDIR=str(out.parent))  # not a cluster that already runs here


def same(one: Path, other: Path) -> None:
    """Exit if two outputs differ."""
    for path in sorted(one.glob("*.parquet")):
        if path.read_bytes() != (other / path.name).read_bytes():
            sys.exit(f"{path} and {other / path.name} differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--images", type=int, default=100, help="per shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="transformers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = rendered_shards(folder / "shards", options.shards, options.images)
        starts: dict[str, list[float]] = {side: [] for side in SIDES}

        def measured(side: str, number: int) -> float:
            working, starting = run(shards, folder / f"{side}-{number}", options.engine, side)
            starts[side].append(starting)
            return working

        figures = alternate({side: lambda number, side=side: measured(side, number) for side in SIDES}, options.rounds)
        for number in range(options.rounds):
            same(folder / f"local-{number}", folder / f"ray-{number}")
        report(
            "ray_overhead",
            figures,
            {package: version(package) for package in ("ray", "torch", "transformers")},
            ratio=quotient(figures["ray"], figures["local"]),
            start={side: round(median(seconds), 1) for side, seconds in starts.items()},
            images=options.shards * options.images,
        )


if __name__ == "__main__":
    main()
