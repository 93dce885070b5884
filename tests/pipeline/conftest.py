"""A caption server on loopback that misbehaves on request, and the command line as users run it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from ..conftest import photo
from .fork_server import ForkServer

COMMAND = [sys.executable, "-m", "capipe.pipeline"]


class CaptionServer:
    """Speaks just enough of the OpenAI protocol. ``fails(n, image)`` decides the n-th request's fate by a status code.

    0 means: never answer. ``requests`` counts them all, ``prompts`` are their texts. ``says``: the caption, where it is
    not to be each image's own.
    """

    def __init__(self) -> None:
        self.fails: Callable[[int, bytes], int] = lambda number, image: 200
        self.requests = 0
        self.prompts: list[str] = []
        self.says: str | None = None
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": "m", "owned_by": "vllm"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = body["messages"][-1]["content"]  # the image, then the text
                image = base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])
                with server.lock:
                    server.requests += 1
                    server.prompts.append(content[1]["text"])
                    code = server.fails(server.requests, image)
                if code == 0:
                    server.released.wait()
                    return
                text = server.says or f"caption of {hashlib.sha256(image).hexdigest()[:8]} at seed {body['seed']}"
                choice = {"message": {"content": text}, "finish_reason": "stop"}
                self.answer(code, {"choices": [choice], "usage": {"completion_tokens": 5}})

            def answer(self, code: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[CaptionServer]:
    made = CaptionServer()
    yield made
    made.close()


_fork_server: ForkServer | None = None  # the session's; started by the first command


@pytest.fixture(scope="session", autouse=True)
def fork_server_ends() -> Iterator[None]:
    yield
    if _fork_server is not None:
        _fork_server.close()


def capipe(
    *arguments: object, code: int = 0, limit_s: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit code: as a fork of one process where that can be, for its imports."""
    global _fork_server
    words, environ = [*map(str, arguments)], {**os.environ, **environment}
    if _fork_server is None:
        _fork_server = ForkServer()
    if _fork_server.takes(words, environ):
        with tempfile.TemporaryDirectory() as said:
            done = _fork_server.run(words, environ, limit_s, Path(said))
    else:
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=limit_s, env=environ)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def table(folder: Path) -> list[dict[str, Any]]:
    """All rows of an artifact in order."""
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a refused command said: a single line for a person."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("capipe: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and questions to train on and to validate on."""
    from .training import quizzed

    folder = tmp_path_factory.mktemp("train")
    quizzed(folder / "train", 8, "train", 3)
    quizzed(folder / "held", 4, "heldout", 4)
    return folder


@pytest.fixture
def recipe(training_data: Path, tmp_path: Path) -> Path:
    """Four steps of the bundled captioner, validated."""
    settings = {
        "model": "tiny/captioner",
        "prompt": "Describe the image.",
        "data": {"shards": str(training_data / "train/shards"), "questions": str(training_data / "train/qa")},
        "rewards": [{"kind": "quiz", "engine": "transformers"}, {"kind": "repetition", "weight": 0.1}],
        "rollout": {"images": 3, "group": 3, "max_tokens": 60},
        "optimizer": {"lr": 1e-5, "warmup": 1},
        "validation": {
            "shards": str(training_data / "held/shards"),
            "questions": str(training_data / "held/qa"),
            "engine": "transformers",
            "every": 2,
        },
        "steps": 4,
        "save_every": 2,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def foreign_tars(make_tar: Callable[..., Path], tmp_path: Path) -> Path:
    """Three foreign tars of six images with text, one of them no image at all."""
    for number in range(3):
        members = {}
        for i in range(6):
            key = f"{number:05}{i:04}"
            members[f"{key}.jpg"] = photo(10 * number + i) if i != 4 else b"<!DOCTYPE html><html></html>"
            members[f"{key}.txt"] = f"alt {i}".encode()
        make_tar(members, f"in/{number:05}.tar")
    return tmp_path / "in"
