"""Jobs without a model on a Ray cluster of this machine: what a lost machine, or the head, costs them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capipe.models.tiny.world.corpus import write_corpus

from ...conftest import capipe
from ...leftovers import staged_environment
from ...sharing import lines, same_shards, wait_until
from .clusters import SLOW, three_machines

ROOT = Path(__file__).parents[4]
IMAGES = 48


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_corpus(folder / "corpus", IMAGES, "heldout", 3)
    capipe("ingest", folder / "corpus", "--out", folder / "shards", "--shard-size", 4)
    return folder


@pytest.fixture(scope="module")
def shards(corpus: Path) -> Path:
    return corpus / "shards"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("PYTHONPATH", staged_environment()["PYTHONPATH"])  # of the cluster's workers
    yield from three_machines()


def start(cluster: Any, *parts: object) -> subprocess.Popen[str]:
    words = [*SLOW, *map(str, parts), "--runner", "ray", "--ray-address", cluster.address]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env={**os.environ})


def with_a_loss(
    cluster: Any, lose: Callable[[], None], watched: Path, committed: int, *parts: object, prefix: str = ""
) -> None:
    """Run a command on the cluster, lose something once so many shards of this prefix are committed, and let it end."""
    process = start(cluster, *parts)

    def reached() -> bool:
        return sum(line.startswith(prefix) for line in lines(watched)) >= committed

    wait_until(lambda: process.poll() is not None or reached())
    assert process.poll() is None, process.communicate()[1]
    lose()
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == 0, stderr
    assert "a worker of the cluster was lost" in stderr, stderr
    # One that was lost before its first task is one that could not start.
    assert "another worker takes over" in stderr or "another one is tried there" in stderr, stderr
    assert "(pid=" not in stdout and len(stdout.splitlines()) <= 3, stdout  # result lines, nothing of Ray's


def lose_a_machine(cluster: Any) -> Callable[[], None]:
    return lambda: cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


@pytest.mark.slow
def test_a_machine_is_lost_while_ingesting(cluster: Any, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["ingest", corpus / "corpus", "--out", out, "--shard-size", 4]
    with_a_loss(cluster, lose_a_machine(cluster), out, 2, *words)
    same_shards(out, corpus / "shards")


@pytest.fixture(scope="module")
def marked(shards: Path) -> Path:
    """What the local runner marks."""
    capipe("dedup", "--shards", shards, "--against", shards / "00000.tar", "--out", shards.parent / "marked")
    return shards.parent / "marked"


@pytest.mark.slow
@pytest.mark.parametrize("watched", ["hashes", "marked/_capipe/near"], ids=["hashes", "tables"])
def test_a_machine_is_lost_while_finding_duplicates(
    cluster: Any, shards: Path, marked: Path, tmp_path: Path, watched: str
) -> None:
    out = tmp_path / "out"
    words = ["dedup", "--shards", shards, "--against", shards / "00000.tar", "--out", out]
    with_a_loss(cluster, lose_a_machine(cluster), out / watched, 2, *words)
    for part in ("hashes", "against", "marked"):
        same_shards(out / part, marked / part)


@pytest.mark.slow
def test_a_machine_is_lost_while_comparing_embeddings(cluster: Any, shards: Path, tmp_path: Path) -> None:
    capipe("embed", "--shards", shards, "--clip", "tiny/clip", "--out", tmp_path / "embedded")
    words = ["dedup", "--shards", shards, "--embeddings", tmp_path / "embedded", "--cosine", 0.9, "--gpus", "none"]
    capipe(*words, "--out", tmp_path / "alone")
    out = tmp_path / "out"
    work = out / "hashes/_capipe/near-embeddings-work"
    with_a_loss(cluster, lose_a_machine(cluster), work, 1, *words, "--out", out, prefix="edges")
    for part in ("hashes", "marked"):
        same_shards(out / part, tmp_path / "alone" / part)
    for name in ("found.parquet", "similar.parquet"):
        kept = Path("hashes/_capipe/near-embeddings", name)
        assert (out / kept).read_bytes() == (tmp_path / "alone" / kept).read_bytes()


@pytest.fixture(scope="module")
def scores(shards: Path) -> Path:
    capipe("filter", "--shards", shards, "--clip", "tiny/clip", "--out", shards.parent / "all", "--shard-size", 4)
    return shards.parent / "all/scores"


@pytest.mark.slow
@pytest.mark.parametrize("index", [[], ["--index"]], ids=["copied", "index"])
def test_a_machine_is_lost_while_selecting(
    cluster: Any, shards: Path, scores: Path, tmp_path: Path, index: list[str]
) -> None:
    words = ["filter", "--shards", shards, "--scores", scores, "--top", 0.6, "--shard-size", 2, *index]
    capipe(*words, "--out", tmp_path / "alone")
    out = tmp_path / "out"
    with_a_loss(cluster, lose_a_machine(cluster), out / "shards", 2, *words, "--out", out)
    same_shards(out / "shards", tmp_path / "alone/shards")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["webdataset", "parquet", "lance"])
def test_a_machine_is_lost_while_exporting(cluster: Any, shards: Path, tmp_path: Path, format: str) -> None:
    words = ["export", shards, "--format", format, "--shard-size", 4]
    capipe(*words, "--out", tmp_path / "alone")
    with_a_loss(cluster, lose_a_machine(cluster), tmp_path / "out", 2, *words, "--out", tmp_path / "out")
    same_shards(tmp_path / "out", tmp_path / "alone")


@pytest.mark.slow
def test_the_head_is_lost(cluster: Any, corpus: Path, tmp_path: Path) -> None:
    """One line of ours ends the command, nothing lies about, and a local run goes on."""
    out = tmp_path / "out"
    words = ["ingest", corpus / "corpus", "--out", out, "--shard-size", 1]
    process = start(cluster, *words)
    wait_until(lambda: process.poll() is not None or len(lines(out)) >= 2)
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == 3 and stdout == "", stderr
    assert "Ray cluster is lost" in stderr.splitlines()[-1]
    assert not (out / "_capipe/claims").exists() and 2 <= len(lines(out)) < IMAGES
    capipe(*words)
    assert len(lines(out)) == len(set(lines(out))) == IMAGES
