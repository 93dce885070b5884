"""The API key and passwords of URLs: used, and found in nothing that commands write, print or show."""

from __future__ import annotations

import base64
import functools
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from ..conftest import photo
from ..models.chat_server import Answer, Double, completion, serving
from .conftest import capipe, one_line, table

MakeTar = Callable[..., Path]
KEY = "sk-c0ffee/4f9a77+bb=="
PASSWORD, WRITTEN = "pa:ss@w0rd!", "pa%3Ass%40w0rd!"
TEXT = "A brown dog lies on a lawn beside a fence."
SECRETS = (
    KEY,
    "sk-c0ffee",  # nor a part of it
    KEY.replace("/", "\\/"),
    PASSWORD,
    WRITTEN,
    base64.b64encode(f"me:{PASSWORD}".encode()).decode(),
)


@pytest.fixture
def shards(make_tar: MakeTar, tmp_path: Path) -> Path:
    make_tar({f"{i:06}.jpg": photo(i, (64, 48)) for i in range(6)}, "in/00000.tar")
    return tmp_path / "in"


class Echo(Double):
    """Every other request is refused with all that the server was told; the rest get a caption with it."""

    def __init__(self) -> None:
        super().__init__(self.answer, owner="somebody")

    def answer(self, n: int, body: dict[str, Any]) -> Answer:
        sent = {"authorization": "none", **self.headers[-1]}
        basic = sent["authorization"].removeprefix("Basic ")
        told = {**sent, "decoded": base64.b64decode(basic).decode() if basic != sent["authorization"] else ""}
        if n % 2:
            return completion(f"{TEXT} {sent['authorization']}")
        padded = "x" * (480 - len("{'host': '127.0.0.1:00000'"))  # a message is cut somewhere, maybe within the key
        form = [json.dumps(told), f"{padded}{told}", f"{sent['authorization']} {told['decoded']}"][n // 2 % 3]
        return 400, {}, {"error": {"message": form, "code": sent["authorization"]}}


@pytest.fixture
def echo() -> Iterator[tuple[Echo, str]]:
    server = Echo()
    with serving(server) as url:
        yield server, url


def everything(folder: Path) -> Iterator[tuple[str, str]]:
    """All files below a folder as text; Parquet unpacked."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path), path.read_bytes().decode("utf-8", "replace")
            if path.suffix == ".parquet":
                yield str(path), json.dumps(pq.read_table(path).to_pylist(), default=str, ensure_ascii=False)


def assert_secret(folder: Path, *done: subprocess.CompletedProcess[str]) -> None:
    printed = [(str(each.args[3]), each.stdout + each.stderr) for each in done]
    for place, text in (*everything(folder), *printed):
        for secret in SECRETS:
            assert secret not in text, f"{secret!r} in {place}: {text[max(0, text.index(secret) - 200) :][:400]}"


def with_user(url: str) -> str:
    return url.replace("://", f"://me:{WRITTEN}@")


@pytest.mark.parametrize("own", ["key", "user"])
def test_a_caption_run_tells_nobody(own: str, shards: Path, tmp_path: Path, echo: tuple[Echo, str]) -> None:
    server, url = echo
    given = with_user(url) if own == "user" else url
    options = ("--shards", shards, "--model", "captioner", "--decode-workers", 1, "--max-attempts", 1)
    environment = {"CAPIPE_API_KEY": f" {KEY}\n"}
    out = tmp_path / "made" / "out"
    said = capipe("annotate", *options, "--out", out, "--engine", given, code=1, **environment)
    basic = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    assert server.headers[0]["authorization"] == (f"Basic {basic}" if own == "user" else f"Bearer {KEY}")
    errors = [row["error"] for row in table(out) if row["error"]]
    assert len(errors) == 3 and all("HTTP 400" in error for error in errors) and "***" in "".join(errors)
    assert all(f"{TEXT} B" in str(row["captions"]) for row in table(out) if row["status"] == "ok")
    assert_secret(tmp_path / "made", said, capipe("status", out), capipe("report", out), capipe("verify", out))

    # The password has no part in what the artifact is: without it, and with another one, the run is the same.
    again = capipe("annotate", *options, "--out", out, "--engine", url, code=1, **environment)
    assert "another configuration" not in again.stderr
    other = url.replace("://", "://me:other@")
    capipe("annotate", *options, "--out", out, "--engine", other, "--retry", code=1, **environment)
    assert_secret(tmp_path / "made")


def chain(shards: Path, engine: str) -> dict[str, Any]:
    config = {"model": "captioner", "engine": engine, "decode-workers": 1, "max-attempts": 1}
    asked = {"model": "captioner", "engine": engine, "decode-workers": 1, "screen": "none"}
    inputs = {"shards": {"path": str(shards)}}
    return {
        "captions": {"stage": "annotate", "inputs": inputs, "config": config},
        "questions": {"stage": "qa", "inputs": inputs, "config": asked},
    }


def recipe(folder: Path, stages: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}))
    return path


def test_a_chain_tells_nobody(shards: Path, tmp_path: Path, echo: tuple[Echo, str]) -> None:
    _, url = echo
    written = recipe(tmp_path, chain(shards, with_user(url)))
    out = tmp_path / "made"
    planned = capipe("run", written, "--out", out, "--dry-run", CAPIPE_API_KEY=KEY)
    assert "me:***@127.0.0.1" in planned.stdout
    said = [capipe("run", written, "--out", out, code=1, CAPIPE_API_KEY=KEY) for _ in range(2)]
    assert "$ capipe annotate" in said[0].stderr and "me:***@127.0.0.1" in said[0].stderr
    shown = [capipe("status", out), capipe("status", out, "--json"), capipe("report", out)]
    assert "***" in (out / "chain.json").read_text()
    assert_secret(out, planned, *said, *shown)

    # Another password changes nothing that was done.
    capipe("run", recipe(tmp_path, chain(shards, url.replace("://", "://me:other@"))), "--out", out, code=1)
    assert "removing" not in said[1].stderr


def test_a_url_with_a_faulty_password_is_refused_without_it(shards: Path, tmp_path: Path) -> None:
    url = f"http://me:{PASSWORD}/x@127.0.0.1:1/v1"
    done = capipe("annotate", "--shards", shards, "--out", tmp_path / "out", "--model", "m", "--engine", url, code=2)
    assert "percent-encode" in one_line(done) and "ss@w0rd" not in done.stderr and "pa:" not in done.stderr


@pytest.mark.parametrize("key", ["sk-\u00e9t\u00e9", "sk-one sk-two"])
def test_a_key_that_is_none_is_refused_at_start(key: str, shards: Path, tmp_path: Path, echo: tuple[Echo, str]) -> None:
    options = ("--shards", shards, "--out", tmp_path / "out", "--model", "m", "--engine", echo[1])
    done = capipe("annotate", *options, code=2, CAPIPE_API_KEY=key)
    assert one_line(done).startswith("capipe: $CAPIPE_API_KEY: has ") and "sk-" not in done.stderr
    assert not (tmp_path / "out").exists() and not echo[0].bodies


class Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def store(shards: Path) -> Iterator[str]:
    """The shards over http, for whoever asks."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_input_from_a_store_with_a_password_tells_nobody(store: str, tmp_path: Path, echo: tuple[Echo, str]) -> None:
    out = tmp_path / "made"
    options = ("--engine", echo[1], "--model", "captioner", "--decode-workers", 1, "--max-attempts", 1)
    done = capipe("annotate", "--shards", with_user(store) + "/{00000..00000}.tar", "--out", out, *options, code=1)
    assert len(table(out)) == 6 and "me:***@127.0.0.1" in (out / "_capipe" / "config.json").read_text()
    assert_secret(out, done, capipe("status", out), capipe("report", out), capipe("verify", out))


@pytest.mark.parametrize("kind", ["chain", "training"])
def test_a_recipe_gets_the_key_for_hosts_that_were_named(kind: str, shards: Path, tmp_path: Path) -> None:
    engine = "http://10.255.255.1:9/v1"
    if kind == "chain":
        command = ["run", recipe(tmp_path, chain(shards, engine)), "--out", tmp_path / "out", "--dry-run"]
    else:
        written = tmp_path / "training.yaml"
        written.write_text(
            yaml.safe_dump(
                {
                    "model": "tiny/captioner",
                    "data": {"shards": str(tmp_path / "nowhere")},
                    "rewards": [{"kind": "judge", "model": "m", "engine": engine}],
                }
            )
        )
        command = ["train", written, "--out", tmp_path / "out"]
    refused = capipe(*command, code=2, CAPIPE_API_KEY=KEY)
    assert all("10.255.255.1" in line and "--allow-host" in line for line in refused.stderr.splitlines())
    assert "--allow-host" in refused.stderr and KEY not in refused.stderr
    code = 0 if kind == "chain" else 2  # the training goes on to look for its data
    allowed = capipe(*command, "--allow-host", "10.255.255.1", code=code, CAPIPE_API_KEY=KEY)
    assert "allow-host" not in allowed.stderr
    if kind == "chain":
        capipe(*command, CAPIPE_API_KEY=KEY, CAPIPE_API_HOSTS="10.255.255.1")
        capipe(*command, CAPIPE_API_KEY="")
