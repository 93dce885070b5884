"""Runs that are killed, in every way, leave no process: no engine that keeps a GPU's memory, no decoder that hangs."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capipe.models.tiny.world.corpus import write_corpus

from .chains import written
from .conftest import COMMAND, capipe, table
from .leftovers import Watched, is_engine, is_spawned, is_worker, lines, staged

IMAGES = 120
RAYS_SECONDS = 120.0  # Ray's agents notice the end of their raylet late
Run = Callable[..., Watched]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("left")
    write_corpus(folder / "corpus", IMAGES, "heldout", 3)
    capipe("ingest", folder / "corpus", "--out", folder / "shards", "--shard-size", 10)
    return folder / "shards"


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Run]:
    """Starts commands, and ends what a failed test left of them."""
    started: list[Watched] = []

    def run(*command: object) -> Watched:
        log = (tmp_path / f"log{len(started)}").open("w+")
        started.append(Watched(command, log))
        return started[-1]

    yield run
    for each in started:
        each.kill_all()


@pytest.fixture
def annotating(shards: Path, tmp_path: Path, watched: Run) -> Run:
    def run(*more: object, engine: str = "vllm") -> Watched:
        options = ["annotate", "--shards", shards, "--out", tmp_path / "out", "--model", "tiny/captioner"]
        options += ["--engine", engine, "--prompt", "dense", "--max-tokens", 200, "--concurrency", 8]
        return watched(*COMMAND, *options, "--trace", tmp_path / "trace", *more)

    return run


def at_work(run: Watched, trace: Path, rows: int = 40) -> None:
    deadline = time.monotonic() + 180
    while lines(trace) < rows:
        assert run.process.poll() is None and time.monotonic() < deadline, run.said
        time.sleep(0.05)


@pytest.mark.slow
def test_the_command_alone_is_killed_at_work(annotating: Run, tmp_path: Path) -> None:
    run = annotating()
    at_work(run, tmp_path / "trace")
    run.wait_for(is_spawned)
    run.process.kill()
    print(f"gone after {run.gone():.2f} s")


@pytest.mark.slow
def test_the_command_alone_is_killed_while_the_engine_starts(annotating: Run) -> None:
    """Three moments: the engine process was just spawned, it is importing, it has its name and loads the model."""
    for pause in (0.0, 2.0, None):
        run = annotating()
        worker = run.wait_for(is_worker)
        run.wait_for(lambda each, boss=worker.pid: each.parent == boss and is_spawned(each))
        if pause is None:
            run.wait_for(is_engine)
        else:
            time.sleep(pause)
        run.process.kill()
        print(f"gone after {run.gone():.2f} s")


@pytest.mark.slow
def test_it_is_asked_to_stop(annotating: Run, tmp_path: Path) -> None:
    """SIGTERM once drains, twice ends at once."""
    run = annotating()
    at_work(run, tmp_path / "trace")
    for _ in range(2):
        run.process.terminate()
        time.sleep(0.3)
    run.process.wait(60)
    print(f"gone after {run.gone():.2f} s")


@pytest.mark.slow
def test_one_worker_is_killed(annotating: Run, tmp_path: Path) -> None:
    """Its engine goes with it, another worker takes over, and the run ends well."""
    run = annotating()
    at_work(run, tmp_path / "trace")
    worker, engine = run.wait_for(is_worker), run.wait_for(is_engine)
    os.kill(worker.pid, signal.SIGKILL)
    started = time.monotonic()
    while engine in run.members():
        assert time.monotonic() - started < 10
        time.sleep(0.02)
    print(f"engine gone after {time.monotonic() - started:.2f} s")
    assert run.process.wait(240) == 0, run.said
    print(f"all gone after {run.gone():.2f} s")
    assert "another worker takes over" in run.said
    assert [row["status"] for row in table(tmp_path / "out")] == ["ok"] * IMAGES


@pytest.mark.slow
def test_one_of_two_workers_fails_for_good(shards: Path, tmp_path: Path, watched: Run) -> None:
    """The other one, at work, closes its engine before the run ends."""
    notes = tmp_path / "notes"
    notes.mkdir()
    fates = {"1": ["bad input"]}
    run = watched(*staged(shards=str(shards), out=str(tmp_path / "out"), notes=str(notes), gpus=["0", "1"], fates=fates,
                          engine="vllm"))  # fmt: skip
    engine = run.wait_for(is_engine)
    assert run.process.wait(240) == 2 and "no such model" in run.said
    assert engine not in run.members()
    print(f"gone after {run.gone():.2f} s")


def test_a_decoder_that_hangs_dies_with_its_killed_command(shards: Path, tmp_path: Path, watched: Run) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    with os.fdopen(os.open(fifo, os.O_RDWR)):  # a writer, so that readers wait for it and not for one to come
        run = watched(*staged(shards=str(shards), out=str(tmp_path / "out"), notes=str(tmp_path), fifo=str(fifo)))
        hung = run.wait_for(lambda each: (tmp_path / f"fifo.{each.pid}").exists())
        run.process.kill()
        print(f"gone after {run.gone():.2f} s")
    assert hung not in run.members()


def test_a_killed_chain_takes_its_stage_along(tmp_path: Path, watched: Run) -> None:
    stages = {"pictures": {"stage": "render", "config": {"images": 5000, "split": "heldout", "seed": 3}}}
    run = watched(*COMMAND, "run", written(tmp_path, stages), "--out", tmp_path / "out")
    stage = run.wait_for(lambda each: "capipe.pipeline render" in each.command)
    run.process.kill()
    print(f"gone after {run.gone():.2f} s")
    assert stage not in run.members()


@pytest.mark.slow
def test_a_killed_torchrun_takes_its_trainers_along(recipe: Path, tmp_path: Path, watched: Run) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = watched(*torchrun, *COMMAND[1:], "train", recipe, "--out", tmp_path / "out")
    deadline = time.monotonic() + 180
    while "step 1/" not in run.said:
        assert run.process.poll() is None and time.monotonic() < deadline, run.said
        time.sleep(0.1)
    run.process.kill()
    print(f"gone after {run.gone():.2f} s")


@pytest.mark.slow
def test_a_command_with_a_cluster_of_its_own_is_killed(annotating: Run, tmp_path: Path) -> None:
    """The actors and the engines they started; Ray's own agents look after their raylet every now and then."""
    run = annotating("--runner", "ray", "--ray-address", "local")
    at_work(run, tmp_path / "trace")
    run.wait_for(is_spawned)
    run.wait_for(lambda each: "raylet" in each.name)
    run.process.kill()
    print(f"gone after {run.gone(rays=RAYS_SECONDS):.2f} s")
