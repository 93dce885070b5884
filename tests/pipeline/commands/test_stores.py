"""Commands on a bucket of a store that throttles, resets, denies or lies: one line with the URL, and nothing lost."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.files.storage import Folder
from capipe.pipeline.inspect.verify import verify

from ...conftest import photo
from ...storing import StoreProxy
from ..conftest import CaptionServer, capipe, one_line


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    return folder


@pytest.fixture
def shards(photos: Path, s3: str, tmp_path: Path) -> str:
    """Three shards of two images in a bucket."""
    capipe("ingest", photos, "--out", f"{s3}/{tmp_path.name}/shards", "--shard-size", 2)
    return f"{s3}/{tmp_path.name}/shards"


def quick(server: CaptionServer) -> list[object]:
    return ["--engine", server.url, "--model", "m", "--decode-workers", "1", "--concurrency", "2"]


@pytest.mark.slow
def test_a_store_that_resets_every_connection(
    store: StoreProxy, shards: str, photos: Path, s3: str, tmp_path: Path, server: CaptionServer
) -> None:
    """Exit 3 and a line with the URL, from every command; the same command goes on once the store is back."""
    out = f"{s3}/{tmp_path.name}/captions"
    store.fate = lambda method, path, headers: "reset"
    for words in (
        ["ingest", photos, "--out", f"{s3}/{tmp_path.name}/new"],
        ["annotate", "--shards", shards, "--out", out, *quick(server)],
        ["status", shards],
        ["verify", shards],
        ["report", f"{s3}/{tmp_path.name}"],
    ):
        said = one_line(capipe(*words, code=3))
        assert re.match(rf"capipe: {s3}/{tmp_path.name}\S*: .*(reset|disconnect|closed|connect)", said, re.I), said
    store.fate = lambda method, path, headers: None
    capipe("annotate", "--shards", shards, "--out", out, *quick(server))
    assert server.requests == 6 and verify(out).faults == []


@pytest.mark.slow
def test_it_begins_to_reset_in_the_middle(
    store: StoreProxy, shards: str, s3: str, tmp_path: Path, server: CaptionServer
) -> None:
    """The run ends, exit 3; finished rows are in the journal."""
    out = f"{s3}/{tmp_path.name}/captions"
    store.fate = lambda method, path, headers: "reset" if server.requests >= 3 else None
    said = capipe("annotate", "--shards", shards, "--out", out, *quick(server), code=3).stderr
    assert said.splitlines()[-1].startswith(f"capipe: {s3}/{tmp_path.name}/") and "Traceback" not in said
    store.fate = lambda method, path, headers: None
    capipe("annotate", "--shards", shards, "--out", out, *quick(server))
    assert verify(out).faults == [] and server.requests <= 8


@pytest.mark.slow
def test_a_store_that_throttles(
    store: StoreProxy, photos: Path, s3: str, tmp_path: Path, server: CaptionServer, monkeypatch: Any
) -> None:
    monkeypatch.setenv("CAPIPE_STORE_PATIENCE", "60")
    dice, root = random.Random(1), f"{s3}/{tmp_path.name}"
    store.fate = lambda method, path, headers: dice.choice([503, 500, "reset", "lost"]) if dice.random() < 0.2 else None
    capipe("ingest", photos, "--out", f"{root}/shards", "--shard-size", 2)
    capipe("annotate", "--shards", f"{root}/shards", "--out", f"{root}/captions", *quick(server), "--share")
    store.fate = lambda method, path, headers: None
    assert server.requests == 6 and verify(f"{root}/captions").faults == [] == verify(f"{root}/shards").faults
    assert not list(Folder(root).fs.unfinished_uploads(Folder(root).path))


@pytest.mark.parametrize("stage", ["ingest", "annotate", pytest.param("export", marks=pytest.mark.slow)])
def test_an_object_that_may_not_be_written_ends_the_run(
    store: StoreProxy, shards: str, photos: Path, s3: str, tmp_path: Path, server: CaptionServer, stage: str
) -> None:
    """One rule for all stages: exit 3, and the object named."""
    out = f"{s3}/{tmp_path.name}/out"
    words = {
        "ingest": ["ingest", photos, "--out", out, "--shard-size", 2],
        "annotate": ["annotate", "--shards", shards, "--out", out, *quick(server)],
        "export": ["export", shards, "--out", out, "--format", "parquet"],
    }[stage]
    store.fate = lambda method, path, headers: 403 if method == "PUT" and "/out/00001" in path else None
    done = capipe(*words, code=3)
    last = done.stderr.splitlines()[-1]
    assert re.match(rf"capipe: {out}/00001\S*: AccessDenied: said the test; fix that and run the same command", last)
    assert "00001" not in Artifact.open(out).committed() and Artifact.open(out).quarantined() == {}
    store.fate = lambda method, path, headers: None
    capipe(*words)
    assert len(Artifact.open(out).committed()) == 3 and verify(out).faults == []


@pytest.mark.parametrize("stage", ["annotate", "export"])
def test_an_input_that_may_not_be_read_is_its_own_shards_fault(
    store: StoreProxy, shards: str, s3: str, tmp_path: Path, server: CaptionServer, stage: str
) -> None:
    """The others go on; exit 1, and `status` names the shard and the object."""
    out = f"{s3}/{tmp_path.name}/out"
    store.fate = lambda method, path, headers: 403 if "/shards/00001.tar" in path else None
    words = ["annotate", "--shards", shards, *quick(server)] if stage == "annotate" else ["export", shards, "--format"]
    capipe(*words, *(["webdataset"] if stage == "export" else []), "--out", out, code=1)
    assert sorted(Artifact.open(out).committed()) == ["00000", "00002"]
    assert f"{shards}/00001.tar" in Artifact.open(out).quarantined()["00001"]


def test_no_permission_and_no_bucket(
    store: StoreProxy, shards: str, photos: Path, s3: str, tmp_path: Path, server: CaptionServer
) -> None:
    out = f"{s3}/{tmp_path.name}/out"
    store.fate = lambda method, path, headers: 403
    for words in (["ingest", photos, "--out", out], ["verify", shards], ["status", shards]):
        said = one_line(capipe(*words, code=3))
        assert said.startswith(f"capipe: {s3}/{tmp_path.name}/") and "Forbidden" in said + "Forbidden", said
    store.fate = lambda method, path, headers: 403 if method == "PUT" else None
    assert one_line(capipe("ingest", photos, "--out", out, code=3)).startswith(f"capipe: {out}/_capipe/")
    store.fate = lambda method, path, headers: None
    annotate = ["annotate", "--shards", shards, "--out", "s3://bukket/captions", *quick(server)]
    for words in (["ingest", photos, "--out", "s3://bukket/shards"], annotate):
        assert one_line(capipe(*words, code=2)).startswith("capipe: s3://bukket/")
    assert not Folder("s3://bukket").exists()


def test_a_store_without_conditional_creation(
    store: StoreProxy, shards: str, s3: str, tmp_path: Path, server: CaptionServer
) -> None:
    store.conditional = False
    words = ["annotate", "--shards", shards, "--out", f"{s3}/{tmp_path.name}/out", *quick(server)]
    said = one_line(capipe(*words, "--share", code=2))
    assert "--share needs a file system with locks, or a store with conditional creation" in said
    capipe(*words)
    assert verify(f"{s3}/{tmp_path.name}/out").faults == []


UPLOAD = """
import sys
from capipe.manifests.artifact import Artifact
artifact = Artifact.create(sys.argv[1], "test", {}, {})
with artifact.begin_files("00000") as shard:
    with shard.writing("00000.tar") as file:
        for _ in range(110):
            file.write(bytes(1 << 20))
    with shard.writing("00000.parquet") as file:
        file.write(b"x")
    shard.commit(rows={}, input_info={"digest": "d"})
"""


@pytest.mark.slow
def test_a_kill_during_a_multipart_upload(store: StoreProxy, s3: str, tmp_path: Path) -> None:
    """The parts that it left cost as much as an object; the next run aborts the upload."""
    url = f"{s3}/{tmp_path.name}"
    store.fate = lambda method, path, headers: "hang" if "partNumber=2" in path else None
    with subprocess.Popen([sys.executable, "-c", UPLOAD, url]) as process:
        deadline = time.monotonic() + 60
        while not store.count("PUT", "partNumber=2") and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    folder = Folder(url)
    assert len(list(folder.fs.unfinished_uploads(folder.path))) == 1 and not folder.exists("00000.tar")
    store.fate = lambda method, path, headers: None
    subprocess.run([sys.executable, "-c", UPLOAD, url], check=True)
    assert list(folder.fs.unfinished_uploads(folder.path)) == [] and folder.size("00000.tar") == 110 << 20
    assert list(Artifact.open(url).committed()) == ["00000"]
