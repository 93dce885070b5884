"""Code shared by the benchmarks: timing, alternating rounds, and the JSON report that ends the output."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers" / "bin"


def capipe_command() -> str:
    """The ``capipe`` of the environment this benchmark runs in."""
    return str(Path(sys.executable).parent / "capipe")


def peer_python() -> str:
    """The interpreter of the peers' environment; exits with the command to install it if it is missing."""
    path = PEERS / "python"
    if not path.exists():
        sys.exit("the tools to compare with are not installed: run `make peers` first")
    return str(path)


def version(package: str, python: str = sys.executable) -> str:
    """A package's version in this environment, or in that of another interpreter."""
    if python == sys.executable:
        return metadata.version(package)
    code = f"from importlib import metadata; print(metadata.version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True)
class Timing:
    """Seconds of a command: wall time, and CPU time of all its processes (less inflated on a busy machine)."""

    wall: float
    cpu: float


def run_timed(command: Sequence[str], log: Path, **environment: str) -> Timing:
    """Time a command, start-up included; its output goes to ``log``. A failure ends the benchmark."""
    with log.open("ab") as out:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        code = subprocess.run(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        ).returncode
        wall = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        sys.exit(f"{command[0]} ended with {code}; {log} ends in:\n{tail}")
    return Timing(wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def alternate(sides: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every side once per round, in reversed order each time, so that a busy machine affects all alike."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            figures[name].append(sides[name](number))
            print(f"round {number + 1}/{rounds}: {name} {figures[name][-1]:.2f}", flush=True)
    return figures


def quotient(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Ratio of medians, rounded for the report."""
    return round(median(ours) / median(theirs), 3)


def report(name: str, figures: dict[str, list[float]], versions: dict[str, str], **more: Any) -> None:
    """Print the last line, a JSON object: medians of ``figures`` (one list of rounds per side), and ``more``."""
    print(
        json.dumps(
            {
                "name": name,
                **{side: round(median(values), 3) for side, values in figures.items()},
                **more,
                "rounds": {side: [round(value, 3) for value in values] for side, values in figures.items()},
                "versions": {"python": platform.python_version(), **versions},
                "machine": {"cores": len(os.sched_getaffinity(0)), "cpu": _cpu(), "load": round(os.getloadavg()[0], 2)},
            }
        )
    )


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
