"""`annotate --share` in a bucket: several commands, no locks, and no shard that is committed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.files.storage import Folder
from capipe.manifests.object_store.log import OBJECTS
from capipe.pipeline.inspect.verify import verify

from ...conftest import photo
from ...storing import StoreProxy
from ..conftest import COMMAND, CaptionServer, capipe
from ..sharing import wait_until

IMAGES, SHARDS = 12, 4
#: For one of the processes: a machine whose clock is two hours ahead.
AHEAD = "import time; real = time.time; time.time = lambda: real() + 7200"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        (folder / f"{number:02d}.jpg").write_bytes(photo(number))
    return folder


@pytest.fixture
def shards(photos: Path, s3: str, tmp_path: Path) -> str:
    capipe("ingest", photos, "--out", f"{s3}/{tmp_path.name}/shards", "--shard-size", IMAGES // SHARDS)
    return f"{s3}/{tmp_path.name}/shards"


@pytest.fixture
def out(store: StoreProxy, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CAPIPE_STORE_PATIENCE", "30")
    return f"{s3}/{tmp_path.name}/out"


class Writers:
    """Commands that share an output, each with a cache of its own, as on machines of their own."""

    def __init__(self, shards: str, out: str, server: CaptionServer, scratch: Path) -> None:
        self._words = ["annotate", "--shards", shards, "--out", out, "--share", "--engine", server.url, "--model", "m"]
        self._words += ["--decode-workers", "1", "--concurrency", "2"]
        self._scratch, self._count = scratch, 0

    def start(self, **environment: str) -> subprocess.Popen[str]:
        self._count += 1
        cache = str(self._scratch / f"cache-{self._count}")
        environ = {**os.environ, "CAPIPE_CACHE": cache, **environment}
        command = [*COMMAND, *self._words]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environ)


@pytest.fixture
def writers(shards: str, out: str, server: CaptionServer, tmp_path: Path) -> Writers:
    return Writers(shards, out, server, tmp_path)


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    stderr = process.communicate(timeout=200)[1]
    assert process.returncode == code, stderr
    return stderr


def committed_once(out: str) -> list[str]:
    """The captions; each shard has a single entry, and nothing lies about."""
    folder = Folder(out)
    assert folder.names(OBJECTS) == [f"{number:05d}.json" for number in range(SHARDS)]
    assert verify(out).faults == []
    left = {"config.json", "manifest.d", "times.d", "probe"}
    assert set(folder.names("_capipe")) <= left, folder.names("_capipe")
    artifact = Artifact.open(out)
    rows = [row for shard in artifact.committed() for row in artifact.read_rows(shard)]
    assert [row["status"] for row in rows] == ["ok"] * IMAGES
    return [row["captions"][0]["text"] for row in rows]


@pytest.mark.slow
def test_two_commands_share_the_work(writers: Writers, out: str, server: CaptionServer) -> None:
    """Each image is asked for once, whoever asks."""
    for process in [writers.start() for _ in range(2)]:
        ended(process)
    committed_once(out)
    assert server.requests == IMAGES


@pytest.mark.slow
def test_one_is_killed(writers: Writers, out: str, server: CaptionServer) -> None:
    """The other finds it dead, and does what is left; the dead one's journal was its machine's own."""
    hang = True
    server.fails = lambda number, image: 0 if hang and number > 4 else 200
    first = writers.start()
    wait_until(lambda: server.requests >= 6, 60)
    hang = False
    second = writers.start()
    wait_until(lambda: len(Folder(out).names("_capipe/owners")) == 2, 60)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    ended(second)
    committed_once(out)
    assert server.requests <= IMAGES + 4


@pytest.mark.slow
def test_the_slower_writer_of_a_shard_ends_last(
    writers: Writers, store: StoreProxy, out: str, server: CaptionServer
) -> None:
    """It was taken for dead, and its claims are gone; its upload ends when the other has committed other bytes. The
    committed shard stays whole."""
    slow, folder = "/out/00000.parquet", Folder(out)

    def fate(method: str, path: str, headers: Any) -> str | None:
        return "late" if method == "PUT" and slow in path and "app/slow" in headers["User-Agent"] else None

    store.fate, server.says = fate, "made by the slower one"
    first = writers.start(AWS_SDK_UA_APP_ID="slow")
    wait_until(lambda: store.count("PUT", slow) > 0, 60)
    for name in folder.names("_capipe/claims"):
        folder.remove_file(f"_capipe/claims/{name}")
    server.says = "made by the quicker one"
    ended(writers.start())
    assert len(folder.names(OBJECTS)) == SHARDS and store.count("PUT", slow) > 1
    before = json.loads(folder.read_bytes(f"{OBJECTS}/00000.json").partition(b"\n")[0])
    store.released.set()
    ended(first)
    after = json.loads(folder.read_bytes(f"{OBJECTS}/00000.json").partition(b"\n")[0])
    assert before == after
    assert committed_once(out)[:3] == ["made by the quicker one"] * 3


@pytest.mark.slow
def test_a_clock_that_is_ahead(writers: Writers, out: str, server: CaptionServer, tmp_path: Path) -> None:
    """Whose machine's clock is hours ahead takes nobody for dead: no shard is done twice."""
    (tmp_path / "ahead").mkdir()
    (tmp_path / "ahead/sitecustomize.py").write_text(AHEAD)
    paths = os.pathsep.join([str(tmp_path / "ahead"), os.environ.get("PYTHONPATH", "")])
    holding = True
    server.fails = lambda number, image: 503 if holding and number > 4 else 200
    first = writers.start()
    wait_until(lambda: server.requests >= 6, 60)
    ahead = writers.start(PYTHONPATH=paths)
    wait_until(lambda: len(Folder(out).names("_capipe/owners")) == 2, 60)
    wait_until(lambda: len(Folder(out).names("_capipe/claims")) >= 2, 60)
    holding = False
    ended(ahead)
    ended(first)
    committed_once(out)
