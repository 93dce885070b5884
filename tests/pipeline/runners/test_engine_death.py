"""Processes that die in the middle of a run, engine or worker: nothing is lost and the run goes on by itself."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from capipe.models.tiny.world.corpus import write_corpus
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.runners.local import WORKER_NAME

from ..conftest import COMMAND, capipe, table

IMAGES = 120


def kill_in_the_middle(tmp_path: Path, engine: str, victim: Callable[[psutil.Process], bool]) -> str:
    """Annotate, kill the first process that ``victim`` accepts once some rows are under way; returns stderr."""
    write_corpus(tmp_path / "corpus", IMAGES, "heldout", 3)
    capipe("ingest", tmp_path / "corpus", "--out", tmp_path / "shards", "--shard-size", 10)
    trace = tmp_path / "trace"
    options = ["annotate", "--shards", tmp_path / "shards", "--out", tmp_path / "out", "--model", "tiny/captioner"]
    options += ["--engine", engine, "--prompt", "dense", "--max-tokens", 200, "--concurrency", 8, "--trace", trace]
    process = subprocess.Popen([*COMMAND, *map(str, options)], stderr=subprocess.PIPE, text=True)
    while not trace.exists() or trace.read_bytes().count(b"\n") < 40:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    next(each for each in family if victim(each)).kill()
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    rows = table(tmp_path / "out")
    assert len(rows) == IMAGES and {row["status"] for row in rows} == {"ok"}
    assert verify(str(tmp_path / "out")).faults == []
    assert trace.read_bytes().count(b"\n") < IMAGES + 40  # finished rows came from the journals
    return stderr


@pytest.mark.slow
def test_vllm_dies_half_way(tmp_path: Path) -> None:
    stderr = kill_in_the_middle(tmp_path, "vllm", lambda process: process.name().startswith("VLLM"))
    assert "the engine died" in stderr and "another worker takes over" in stderr


@pytest.mark.slow
def test_the_worker_dies_half_way(tmp_path: Path) -> None:
    stderr = kill_in_the_middle(tmp_path, "transformers", lambda process: process.cmdline()[-1:] == [WORKER_NAME])
    assert "the worker process died (exit code -9)" in stderr
