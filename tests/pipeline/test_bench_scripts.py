"""Scripts of `bench/`, as they are called: each can be started, and some of them end with their figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT / "bench")) for path in (ROOT / "bench").rglob("*.py") if not path.name.startswith("_")
)
#: Sizes at which a script takes seconds.
SMALL = {
    "dedup.py": "--sizes 3000 6000 --images 1000",
    "stages/dedup_embeddings.py": "--sizes 10000",
    "stages/index.py": "--rows 2000 --shard 1000",
    "stages/text_dedup.py": "--sizes 1000 2000",
}


def ran(script: str, *words: str) -> str:
    command = [sys.executable, str(ROOT / "bench" / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_finds_all_that_it_imports(script: str) -> None:
    ran(script, "--help")


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_a_script_ends_with_its_figures(script: str) -> None:
    figures: dict[str, Any] = json.loads(ran(script, *SMALL[script].split()).splitlines()[-1])
    assert figures["name"] == Path(script).stem and figures["machine"]["cores"] >= 1
    if script == "dedup.py":
        assert figures["second_pass"]["rows"]["duplicate"] >= 95
    if script == "stages/index.py":
        assert figures["agree"] is True and figures["rows"] == 2000
