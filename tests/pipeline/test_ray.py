"""The Ray runner on clusters of this machine: what a lost machine or worker costs, and what it does not."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import COMMAND, capipe, one_line
from .sharing import CAPTIONS, lines, rendered, same_shards, wait_until

STORE = 80 * 2**20
SLOWLY = [*CAPTIONS, "--prompt", "dense", "--max-tokens", "160", "--concurrency", "4"]  # there is a middle to it


def words(*parts: object) -> list[str]:
    return [*COMMAND, *map(str, parts)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered(tmp_path_factory.mktemp("ray"))


def test_no_head_at_the_address(shards: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = ["annotate", "--shards", shards, "--out", tmp_path / "out", *CAPTIONS, "--runner", "ray"]
    line = one_line(capipe(*common, "--ray-address", address, code=2))
    assert f"--ray-address {address}: no Ray head answers there" in line and "ray start --head" in line
    assert f"RAY_ADDRESS {address}: no Ray head" in one_line(capipe(*common, code=2, RAY_ADDRESS=address))
    line = one_line(capipe(*common, "--ray-address", "ray://far:10001", code=2))
    assert "not HOST:PORT of a Ray head" in line
    assert not (tmp_path / "out").exists()


def test_options_that_contradict_each_other(shards: Path, tmp_path: Path) -> None:
    common = ["annotate", "--shards", shards, "--out", tmp_path / "out", *CAPTIONS]
    assert "only means something with --runner ray" in one_line(capipe(*common, "--ray-workers", 2, code=2))
    assert "hands out its GPUs itself" in one_line(capipe(*common, "--runner", "ray", "--gpus", "0", code=2))
    assert "at least 1" in one_line(capipe(*common, "--runner", "ray", "--ray-workers", 0, code=2))


def test_without_ray_a_line_says_how_to_get_it(shards: Path, tmp_path: Path) -> None:
    hidden = (
        "import importlib.util as u, sys; find = u.find_spec;"
        "u.find_spec = lambda name, *more: None if name == 'ray' else find(name, *more);"
        "from capipe.pipeline.cli import main; sys.argv[0] = 'capipe'; sys.exit(main())"
    )
    command = ["annotate", "--shards", shards, "--out", tmp_path / "out", *CAPTIONS, "--runner", "ray"]
    run = [os.sys.executable, "-c", hidden, *map(str, command)]  # type: ignore[attr-defined]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "pip install 'capipe[ray]'" in one_line(done)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Three machines with room for one worker each."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # before it is imported: loopback alone
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=STORE)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def alone(shards: Path) -> Path:
    """What the local runner makes of the same input."""
    captioned = shards.parent / "alone"
    capipe("annotate", "--shards", shards, "--out", captioned, *SLOWLY)
    return captioned


def start(cluster: Any, *parts: object) -> subprocess.Popen[str]:
    command = words(*parts, "--runner", "ray", "--ray-address", cluster.address)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def with_a_loss(cluster: Any, command: list[object], out: Path, lose: Callable[[], None]) -> str:
    """Run a command on the cluster, have something lost after the second commit, and let it end."""
    process = start(cluster, *command, "--out", out)
    wait_until(lambda: process.poll() is not None or len(lines(out)) >= 2)
    assert process.poll() is None, process.communicate()[1]
    lose()
    stderr = process.communicate(timeout=280)[1]
    assert process.returncode == 0, stderr
    return stderr


@pytest.mark.slow
def test_a_machine_is_lost(cluster: Any, shards: Path, alone: Path, tmp_path: Path) -> None:
    def lose() -> None:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    command: list[object] = ["annotate", "--shards", shards, *SLOWLY]
    stderr = with_a_loss(cluster, command, tmp_path / "out", lose)
    assert "a worker of the cluster was lost" in stderr and "another worker goes on" in stderr
    same_shards(tmp_path / "out", alone)


@pytest.mark.slow
def test_a_worker_is_killed(cluster: Any, shards: Path, alone: Path, tmp_path: Path) -> None:
    def lose() -> None:
        mine = psutil.Process().children(recursive=True)
        next(each for each in mine if each.name().startswith("ray::RayWorker")).kill()

    command: list[object] = ["annotate", "--shards", shards, *SLOWLY]
    stderr = with_a_loss(cluster, command, tmp_path / "out", lose)
    assert "a worker of the cluster was lost" in stderr
    same_shards(tmp_path / "out", alone)
