"""What commands that look open of what a manifest names: local tars, the store that they were given, and no more."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.config_file import DIGEST, digest
from capipe.manifests.files.allowed import Allowed
from capipe.manifests.files.outside import Refused
from capipe.manifests.files.storage import Folder
from capipe.manifests.fingerprint import canonical
from capipe.manifests.manifest import LINES, _checksum
from capipe.pipeline.inspect.images import RowImages
from capipe.pipeline.inspect.shard_join import ShardJoin, ShardName
from capipe.pipeline.inspect.status_view import overview
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.jobs.eval import _captions_of
from capipe.pipeline.report.page import write_report
from capipe.stages.export.provenance import chain

from ..conftest import capipe, table
from ..looking import write_captions, write_images


class Store:
    """A folder served on loopback; ``asked`` are the paths that anybody asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        store = self

        class Handler(SimpleHTTPRequestHandler):
            def parse_request(self) -> bool:
                sound = super().parse_request()
                store.asked.append(self.path if sound else "?")
                return sound

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "served").mkdir()
    made = Store(tmp_path / "served")
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Captions alone, whose tars lie elsewhere: where, :func:`name` says."""
    write_images(tmp_path / "elsewhere", [3])
    write_captions(tmp_path / "elsewhere", tmp_path / "given/captions")
    return tmp_path / "given/captions"


def name(artifact: Path, url: str, **config: str) -> None:
    """Let an artifact's manifest name another input, signed as its own lines are, which anybody can."""
    path = artifact / LINES
    entry = json.loads(path.read_bytes().split(b"\n")[0])
    entry["input"]["url"] = url
    del entry["checksum"]
    path.write_text(canonical({**entry, "checksum": _checksum(entry)}) + "\n")
    settings = artifact / "_capipe/config.json"
    whole = json.loads(settings.read_text())
    whole["run"].update(config)
    settings.write_text(json.dumps({**whole, DIGEST: digest(whole)}))


def served(tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "served/elsewhere")
    shutil.rmtree(tmp_path / "elsewhere")


def pictures_in(folder: Path, *images: str) -> tuple[int, str]:
    page = Path(write_report(folder, images=images)).read_text()
    return page.count("data:image/jpeg"), page


REFERENCE = json.dumps({"version": 1, "templates": {}, "gen": [{"key": "{{ ''.__class__ }}", "url": "x"}], "refs": {}})


@pytest.mark.parametrize(
    "url",
    [
        "{store}/elsewhere/00000.tar",
        "reference://x::{store}/evil.json/00000.tar",
        "reference://x/00000.tar",
        "simplecache::{store}/elsewhere/00000.tar",
        "filecache://{store}/elsewhere/00000.tar",
        "zip://x::{store}/00000.tar",
        "file:///tmp/x::{store}/00000.tar",
        "ftp://127.0.0.1:1/00000.tar",
    ],
)
def test_of_a_local_folder_nothing_on_the_network_is_asked_for(
    tmp_path: Path, captions: Path, store: Store, url: str
) -> None:
    served(tmp_path)
    (tmp_path / "served/evil.json").write_text(REFERENCE)
    url = url.format(store=store.url)
    name(captions, url, shards=url.removesuffix("/00000.tar"))
    shown, page = pictures_in(captions.parent)
    assert shown == 0 and "images: not shown: " in page
    assert verify(str(captions)).notes[0].startswith("rows were not compared with its input (")
    assert overview(str(captions.parent)).artifacts and overview(str(captions)).artifacts
    fastapi = pytest.importorskip("fastapi", reason="the viewer needs capipe[view]")
    assert fastapi
    from ..viewing import client_of, get

    with client_of(captions.parent) as client:
        a = get(client, "catalog")["artifacts"][0]["id"]
        for size in ("small", "full"):
            answer = client.get("/api/image", params={"a": a, "shard": "00000", "row": 0, "size": size})
            assert answer.status_code == 404 and "no image of this row: " in answer.json()["error"]
        assert get(client, "rows", a=a)["faults"][0].startswith("Images are not shown: ")
    assert store.asked == []


def test_what_would_let_a_store_be_read_is_named_and_does(tmp_path: Path, captions: Path, store: Store) -> None:
    served(tmp_path)
    name(captions, f"{store.url}/elsewhere/00000.tar", shards=f"{store.url}/elsewhere")
    page = pictures_in(captions.parent)[1]
    assert f"--images {store.url}/elsewhere lets it be read" in page
    for given in (store.url, f"{store.url}/elsewhere/", f"{store.url}/elsewhere/00000.tar".replace("http:", "HTTP:")):
        shown, page = pictures_in(captions.parent, given)
        assert shown == 2 and "not shown" not in page and store.asked, given
        store.asked.clear()
    for other in (f"{store.url}/other", f"{store.url}/else", str(tmp_path)):
        assert pictures_in(captions.parent, other)[0] == 0, other
        assert all(f"{store.url}{path}".startswith(f"{other}/") for path in store.asked), store.asked
        store.asked.clear()
    assert verify(str(captions), [store.url]).notes == [] and store.asked


def test_the_option_is_on_the_command_line(tmp_path: Path, captions: Path, store: Store) -> None:
    served(tmp_path)
    name(captions, f"{store.url}/elsewhere/00000.tar", shards=f"{store.url}/elsewhere")
    said = capipe("report", captions.parent)
    assert "images not shown: " in said.stderr and "--images" in said.stderr and store.asked == []
    done = capipe("report", captions.parent, "--images", f"{store.url}/x", "--images", store.url)
    assert (
        "not shown" not in done.stderr and (captions.parent / "report.html").read_text().count("data:image/jpeg") == 2
    )
    assert "rows were not compared" in capipe("verify", captions).stdout
    assert "rows were not compared" not in capipe("verify", captions, "--images", store.url).stdout


def test_a_chain_is_never_followed_not_even_below_what_was_named() -> None:
    allowed = Allowed("s3://bucket/x", ("http://host/", "reference://x"))
    assert allowed.place("http://host/a/0.tar") == "http://host/a/0.tar"
    assert allowed.place("s3a://bucket/y/0.tar") == "s3a://bucket/y/0.tar"
    for url in (
        "http://host/a::http://host/b.tar",
        "reference://x/0.tar",
        "reference::http://host/a.tar",
        "s3://bucket/x::s3://bucket/0.tar",
        "s3://bucket.evil/0.tar",
        "s3://other/0.tar",
        "http://host.evil/0.tar",
        "http://user@host/0.tar",
        "https://host/0.tar",
        "/proc/self/environ.tar",
        "//proc/../proc/self/fd/0.tar",
        "/dev/zero",
        "file:///proc/self/mem.tar",
    ):
        with pytest.raises(Refused):
            allowed.place(url)
    below = Allowed("/data", ("http://host/open",))
    for url in ("http://host/open/../shut/0.tar", "http://host/open/%2e%2E/0.tar", "http://host/openly/0.tar"):
        with pytest.raises(Refused, match="--images"):
            below.place(url)
    assert allowed.place("/dev/shm/shards/0.tar") == "/dev/shm/shards/0.tar"
    assert allowed.place("file:///data/0.tar") == "/data/0.tar"


def test_a_local_tar_that_a_manifest_names_is_shown(
    tmp_path: Path, captions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (f"{tmp_path}/elsewhere/00000.tar", "elsewhere/00000.tar", f"file://{tmp_path}/elsewhere/00000.tar"):
        name(captions, url)
        shown, page = pictures_in(captions.parent)
        assert shown == 2 and "not shown" not in page, url


def test_a_tar_that_is_no_file_is_neither_opened_nor_waited_for(tmp_path: Path, captions: Path) -> None:
    (tmp_path / "other").mkdir()
    os.mkfifo(tmp_path / "other/00000.tar")
    (tmp_path / "other/00001.tar").symlink_to("/dev/zero")
    for file in ("00000.tar", "00001.tar"):
        name(captions, f"{tmp_path}/other/{file}")
        shown, page = pictures_in(captions.parent)
        assert shown == 0 and "not a regular file" in page


def test_a_pipe_in_the_place_of_an_artifacts_own_tar(tmp_path: Path) -> None:
    write_images(tmp_path / "shards", [3])
    (tmp_path / "shards/00000.tar").unlink()
    os.mkfifo(tmp_path / "shards/00000.tar")
    assert pictures_in(tmp_path)[0] == 0


def test_tars_that_moved_are_found_by_name_and_size_where_the_user_says(tmp_path: Path, captions: Path) -> None:
    (tmp_path / "elsewhere/00000.tar").rename(tmp_path / "00000.tar")
    assert pictures_in(captions.parent)[0] == 0
    assert pictures_in(captions.parent, str(tmp_path))[0] == 2
    with (tmp_path / "00000.tar").open("ab") as tar:
        tar.write(bytes(512))  # another tar of that name
    assert pictures_in(captions.parent, str(tmp_path))[0] == 0


def test_of_a_folder_in_a_store_its_own_store_is_read(tmp_path: Path, captions: Path, s3: str) -> None:
    fs = fsspec.filesystem("s3")
    for part in ("elsewhere", "given/captions"):
        fs.put(str(tmp_path / part), f"{s3}/named/{part}".removeprefix("s3://"), recursive=True)
    for url, given, shown in (
        (f"{s3}/named/elsewhere/00000.tar", f"{s3}/named", True),
        (f"{s3}/named/elsewhere/00000.tar", str(captions.parent), False),
        ("s3://another/elsewhere/00000.tar", f"{s3}/named", False),
    ):
        name(captions, url)
        join = ShardJoin({"captions": Artifact.open(str(captions))})
        pictures = RowImages(Allowed(given))
        row: dict[str, Any] = table(captions)[0]
        found = pictures.of(join, ShardName("captions", "00000"), row)
        assert (found is not None) == shown and bool(pictures.refused) != shown
    assert Folder(f"{s3}/named").exists("elsewhere/00000.tar")


def test_pipes_and_devices_in_the_place_of_logs_are_not_waited_for(tmp_path: Path) -> None:
    write_images(tmp_path / "shards", [3], only=0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('{"steps": 5}')
    os.mkfifo(tmp_path / "run/steps.jsonl")
    (tmp_path / "run/times.jsonl").symlink_to("/dev/zero")
    (tmp_path / "shards/_capipe/journal").mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "shards/_capipe/journal/00000.jsonl")
    found = capipe("status", tmp_path, limit_s=100).stdout
    assert "run: training, step 0/5" in found and "shards: ingest" in found
    assert capipe("report", tmp_path, limit_s=100).stdout


def test_a_card_and_a_comparison_do_not_ask_either(tmp_path: Path, captions: Path, store: Store) -> None:
    served(tmp_path)
    url = f"{store.url}/elsewhere"
    name(captions, f"{url}/00000.tar", shards=url)
    first = chain(Artifact.open(str(captions)))[0]
    assert first.config is None and first.note is not None and first.note.startswith("not looked at")
    assert _captions_of(url, Allowed(str(captions))) is None and store.asked == []
    assert _captions_of(url, None) is not None and store.asked, "what the command line itself named is opened"


def test_a_store_that_cannot_be_reached_is_a_reason(tmp_path: Path, captions: Path) -> None:
    name(captions, "http://127.0.0.1:1/elsewhere/00000.tar")
    shown, page = pictures_in(captions.parent, "http://127.0.0.1:1")
    assert shown == 0 and "not shown: http://127.0.0.1:1/elsewhere/00000.tar: " in page
