"""What makes the tests end in time: one process per file, and commands that are forked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from capipe.models.engines.vllm.environment import prepare_environment

from .fork_server import ForkServer, _read_by_imports

ROOT = Path(__file__).resolve().parents[2]
FILES = ("tests/trainer/test_metrics.py", "tests/manifests/files/test_names.py")


@pytest.mark.slow
def test_the_tests_of_a_file_share_a_process() -> None:
    """A plugin's grouping can stop working without a word; then every file's fixtures are made twice."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "--no-loadscope-reorder",
        "-v",
        "-p",
        "no:cacheprovider",
        *FILES,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    workers = defaultdict(list)
    for worker, file in re.findall(r"^\[(gw\d)\].* PASSED (\S+?)::", done.stdout, re.MULTILINE):
        workers[file].append(worker)
    assert set(workers) == {*FILES} and all(len(those) > 1 == len(set(those)) for those in workers.values())


def test_commands_are_forked_also_where_vllm_was_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    server = object.__new__(ForkServer)  # without its process
    monkeypatch.setattr(os, "environ", {**os.environ})
    server._environ = _read_by_imports(os.environ)
    prepare_environment()
    assert server.takes(["annotate", "--engine", "transformers"], os.environ)
    assert not server.takes(["annotate", "--engine", "vllm"], os.environ)
    assert not server.takes(["annotate"], {**os.environ, "HF_HUB_OFFLINE": "0"})
