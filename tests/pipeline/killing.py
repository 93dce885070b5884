"""`kill -9` of a command at random moments of its work: as many as asked for, however quick the machine."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_QUIET = subprocess.DEVNULL
_MANIFEST = "_capipe/manifest.jsonl"


def committed(out: Path) -> int:
    """Shards committed in ``out``, which is an artifact or a folder of some."""
    # No recursive search: folders come and go in there, and it fails where one goes while it is looked into.
    found = [out / _MANIFEST, *out.glob(f"*/{_MANIFEST}")]
    return sum(path.read_bytes().count(b"\n") for path in found if path.exists())


def run_killed(
    command: Sequence[object],
    out: Path,
    total: int,
    kills: int,
    seed: int,
    within: float = 0.3,
    cwd: Path | None = None,
) -> list[int]:
    """Start ``command``, which writes to ``out``, and kill it with all its processes, ``kills`` times; then let it end.

    Each moment lies up to ``within`` seconds after a random one of the ``total`` commits that a whole run makes, or
    before the first. Returns how many there were at each kill: a run that was over before its kill is not counted.
    Raises CalledProcessError where the last run, which nobody kills, ends badly.
    """
    rng, words = random.Random(seed), [str(part) for part in command]
    found = []
    for target in sorted(rng.randrange(total) for _ in range(kills)):
        process = subprocess.Popen(words, start_new_session=True, stdout=_QUIET, stderr=_QUIET, cwd=cwd)
        while process.poll() is None and committed(out) < target:
            time.sleep(0.002)
        deadline = time.monotonic() + rng.uniform(0, within)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            found.append(committed(out))
    subprocess.run(words, check=True, stdout=_QUIET, stderr=_QUIET, cwd=cwd)
    return found
