"""The Ray runner on clusters of this machine: what a lost machine or worker costs, and what it does not."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from capipe.manifests.artifact import Artifact
from capipe.pipeline.runners.ray import actor
from capipe.pipeline.runners.ray.actor import DriverContext, RayWorker

from ...conftest import COMMAND, CaptionServer, capipe, one_line, table
from ...leftovers import staged_environment
from ...sharing import CAPTIONS, IMAGES, lines, rendered, same_shards, wait_until
from .clusters import SLOW, three_machines

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
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("PYTHONPATH", staged_environment()["PYTHONPATH"])  # of the cluster's workers
    yield from three_machines()


@pytest.fixture(scope="module")
def alone(shards: Path) -> Path:
    """What the local runner makes of the same input."""
    captioned = shards.parent / "alone"
    capipe("annotate", "--shards", shards, "--out", captioned, *SLOWLY)
    return captioned


def start(cluster: Any, *parts: object) -> subprocess.Popen[str]:
    command = [*SLOW, *map(str, parts), "--runner", "ray", "--ray-address", cluster.address]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def lose_a_machine(cluster: Any) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


def with_a_loss(
    cluster: Any, command: list[object], out: Path, lose: Callable[[], None], watched: Path | None = None
) -> None:
    """Run a command on the cluster, have something lost after the first commit, and let it end."""
    process = start(cluster, *command, "--out", out)
    wait_until(lambda: process.poll() is not None or len(lines(watched or out)) >= 1)
    assert process.poll() is None, process.communicate()[1]
    lose()
    stderr = process.communicate(timeout=280)[1]
    assert process.returncode == 0, stderr
    assert "a worker of the cluster was lost" in stderr
    # One that was lost before its first row is one that could not start.
    assert "another worker takes over" in stderr or "another one is tried there" in stderr


@pytest.mark.slow
def test_a_machine_is_lost(cluster: Any, shards: Path, alone: Path, tmp_path: Path) -> None:
    command: list[object] = ["annotate", "--shards", shards, *SLOWLY]
    with_a_loss(cluster, command, tmp_path / "out", lambda: lose_a_machine(cluster))
    same_shards(tmp_path / "out", alone)


@pytest.mark.slow
def test_a_worker_is_killed(cluster: Any, shards: Path, alone: Path, tmp_path: Path) -> None:
    def lose() -> None:
        mine = psutil.Process().children(recursive=True)
        next(each for each in mine if each.name().startswith("ray::RayWorker")).kill()

    command: list[object] = ["annotate", "--shards", shards, *SLOWLY]
    with_a_loss(cluster, command, tmp_path / "out", lose)
    same_shards(tmp_path / "out", alone)


@pytest.mark.slow
def test_a_machine_is_lost_while_scoring(cluster: Any, shards: Path, alone: Path, tmp_path: Path) -> None:
    command: list[object] = ["filter", "--shards", shards, "--captions", alone, "--clip", "tiny/clip", "--top", 0.5]
    capipe(*command, "--out", tmp_path / "alone")
    with_a_loss(cluster, command, tmp_path / "out", lambda: lose_a_machine(cluster), tmp_path / "out/scores")
    for part in ("scores", "shards"):
        same_shards(tmp_path / "out" / part, tmp_path / "alone" / part)


def asking(shards: Path) -> list[object]:
    about = ["qa", "--shards", shards, "--model", "tiny/teacher", "--engine", "transformers"]
    return [*about, "--decode-workers", 1, "--per-image", 2, "--presentations", 1]


@pytest.fixture(scope="module")
def quiz(shards: Path) -> Path:
    """What the local runner asks."""
    asked = shards.parent / "quiz"
    capipe(*asking(shards), "--out", asked)
    return asked


@pytest.mark.slow
def test_a_machine_is_lost_while_writing_a_quiz(cluster: Any, shards: Path, quiz: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with_a_loss(cluster, asking(shards), out, lambda: lose_a_machine(cluster), out / "written")
    for part in ("written", "screened"):
        same_shards(out / part, quiz / part)


@pytest.mark.slow
def test_a_machine_is_lost_while_grading(cluster: Any, shards: Path, alone: Path, quiz: Path, tmp_path: Path) -> None:
    command: list[object] = ["eval", "--shards", shards, "--questions", quiz]
    command += ["--captions", alone, "--reader", "tiny/holdout-reader", "--engine", "transformers"]
    capipe(*command, "--out", tmp_path / "alone")
    with_a_loss(cluster, command, tmp_path / "out", lambda: lose_a_machine(cluster), tmp_path / "out/graded")
    same_shards(tmp_path / "out/graded", tmp_path / "alone/graded")


@pytest.mark.slow
def test_ctrl_c_drains_and_a_local_run_ends_it(
    cluster: Any, shards: Path, tmp_path: Path, server: CaptionServer
) -> None:
    out = tmp_path / "out"
    command = ["annotate", "--shards", shards, "--out", out, "--model", "m", "--engine", server.url]
    command += ["--concurrency", 1, "--decode-workers", 1]
    process = start(cluster, *command)
    wait_until(lambda: server.requests >= 10)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "run the same command to go on" in stderr, stderr
    capipe(*command)
    assert [row["status"] for row in table(out)] == ["ok"] * IMAGES
    assert server.requests <= IMAGES + 6  # three workers: what each had in the engine, and no more


@pytest.mark.slow
def test_without_a_cluster_one_is_started_on_loopback(shards: Path, alone: Path, tmp_path: Path) -> None:
    command = words("annotate", "--shards", shards, "--out", tmp_path / "out", *SLOWLY, "--runner", "ray")
    folder = tempfile.mkdtemp()  # where no other cluster has left a note; a short path, since sockets lie in it
    environ = {**os.environ, "RAY_TMPDIR": folder}
    process = subprocess.Popen([*command, "--ray-workers", "2"], stderr=subprocess.PIPE, text=True, env=environ)
    wait_until(lambda: process.poll() is not None or len(lines(tmp_path / "out")) >= 1)
    assert process.poll() is None, process.communicate()[1]
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    (own,) = Path(folder).glob("*")
    assert stat.S_IMODE(own.stat().st_mode) == 0o700 and list(own.glob("r/session_*/sockets/raylet*"))
    tokens = [member.environ().get("RAY_AUTH_TOKEN") for member in family if member.name() in ("raylet", "gcs_server")]
    assert tokens and tokens[0] and set(tokens) == {tokens[0]}
    sockets = [each for member in family for each in member.net_connections("inet") if each.status == "LISTEN"]
    assert sockets and {each.laddr.ip for each in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    stderr = process.communicate(timeout=280)[1]
    assert process.returncode == 0, stderr
    same_shards(tmp_path / "out", alone)
    Path(folder).rmdir()  # nothing is left of the cluster


def other_folder(tmp_path: Path) -> Artifact:
    artifact = Artifact.create(str(tmp_path / "other"), "test", {}, {})
    artifact.close()
    return artifact


async def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "VISIBLE_SECONDS", 1)
    monkeypatch.setattr(os, "environ", {**os.environ})  # an actor's becomes its driver's
    artifact = Artifact.create(str(tmp_path / "out"), "test", {}, {})
    artifact.close()
    assert await RayWorker(DriverContext.current())._problem(artifact) is None
    (tmp_path / "out/_capipe/config.json").unlink()  # as where the folder is another disk's
    failure = await RayWorker(DriverContext.current())._problem(artifact)
    assert failure is not None and failure.final and failure.exit_code == 2
    assert "does not see what was begun there; give --out a folder that all machines" in failure.reason
    unseen = await RayWorker(DriverContext.current())._problem(other_folder(tmp_path), ["/", f"{tmp_path}/photos"])
    assert unseen is not None and unseen.final and unseen.exit_code == 2
    assert unseen.reason.startswith(f"{tmp_path}/photos: ") and "does not see it; have it in a folder" in unseen.reason
    other = await RayWorker(DriverContext("0.0.0", str(tmp_path), {}))._problem(artifact)
    assert other is not None and "and 0.0.0 was started; install that there, too" in other.reason
