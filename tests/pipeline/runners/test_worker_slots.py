"""Worker slots that cannot start: one bad GPU costs one GPU, here and on a cluster; only all of them cost the run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ...conftest import photo, tar_bytes
from ..conftest import table
from ..leftovers import staged, staged_environment

SHARDS, ROWS = 6, 4


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in range(SHARDS):
        members = {f"{shard}{row}.jpg": photo(10 * shard + row) for row in range(ROWS)}
        (folder / f"{shard:05}.tar").write_bytes(tar_bytes(members))
    (tmp_path / "notes").mkdir()
    return folder


def run(shards: Path, code: int, **options: object) -> str:
    folder = shards.parent
    command = staged(shards=str(shards), out=str(folder / "out"), notes=str(folder / "notes"), **options)
    done = subprocess.run(command, env=staged_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def loads(shards: Path, place: int) -> int:
    return len(list((shards.parent / "notes").glob(f"load.{place}.*")))


def all_there(shards: Path) -> bool:
    rows = table(shards.parent / "out")
    return len(rows) == SHARDS * ROWS and {row["status"] for row in rows} == {"ok"}


@pytest.mark.slow
def test_a_device_that_is_taken_costs_that_device(shards: Path) -> None:
    said = run(shards, 0, gpus=["0", "1"], fates={"1": ["taken"]}, pauses=[0.1, 0.1])
    assert all_there(shards) and loads(shards, 0) == 1
    assert "a worker on GPU 1 could not start: no memory on the card of place 1; another one is tried there" in said


@pytest.mark.slow
def test_it_is_given_up_in_words_while_the_others_work(shards: Path) -> None:
    said = run(shards, 0, gpus=["0", "1"], fates={"0": ["taken", "broken", "exit"], "1": ["late"]}, pauses=[0.0, 0.0])
    assert all_there(shards) and loads(shards, 0) == 3 and loads(shards, 1) == 1
    assert "could not start: RuntimeError: place 0 has fallen off the bus;" in said
    assert "GPU 0 is given up, as 3 workers in a row ended there before they finished a row: the worker process" in said


@pytest.mark.slow
def test_all_devices_are_broken(shards: Path) -> None:
    said = run(shards, 3, gpus=["0", "1"], fates={"0": ["taken"], "1": ["broken"]})
    assert loads(shards, 0) == loads(shards, 1) == 3
    last = said.splitlines()[-1]
    assert "3 workers in a row on GPU" in last and last.endswith("the last place that was left")
    assert run(shards, 0, gpus=["0", "1"]) and all_there(shards)  # the same command, once that is mended


@pytest.mark.slow
def test_memory_that_comes_free_a_moment_later(shards: Path) -> None:
    said = run(shards, 0, gpus=["3"], fates={"3": ["taken", "well"]})
    assert all_there(shards) and loads(shards, 3) == 2 and "another one is tried there in 0.2 s" in said


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two machines with room for one worker each."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # before it is imported: loopback alone
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = staged_environment()["PYTHONPATH"]  # for the machines' workers
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    yield made
    made.shutdown()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fates", "code", "told"),
    [
        ({"0": ["taken"]}, 0, ["no memory on the card of place 0; another one is tried there"]),
        ({"0": ["taken", "well"]}, 0, ["could not start: no memory on the card of place 0"]),
        ({"0": ["taken"], "1": ["broken"]}, 3, ["ended before they finished a row, the last place that was left"]),
    ],
)
def test_machines_of_a_cluster(
    shards: Path, cluster: Any, fates: dict[str, list[str]], code: int, told: list[str]
) -> None:
    said = run(shards, code, address=cluster.address, workers=2, fates=fates)
    assert all(each in said for each in told), said
    assert code or all_there(shards)
    assert f"a worker on {os.uname().nodename} could not start" in said
