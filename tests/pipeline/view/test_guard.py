"""Whom the viewer answers, what it never opens, and the command around it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from capipe.errors import BadInput

fastapi = pytest.importorskip("fastapi", reason="the viewer needs capipe[view]")
import httpx  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from capipe.pipeline.view.library import id_of  # noqa: E402
from capipe.pipeline.view.server import chosen_token, is_loopback, listen  # noqa: E402

from ..conftest import capipe, one_line  # noqa: E402
from ..looking import write_captions, write_images  # noqa: E402
from ..viewing import client_of  # noqa: E402


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    write_images(folder / "shards", [4])
    write_captions(folder / "shards", folder / "captions")
    return folder


@pytest.fixture(scope="module")
def client(chain: Path) -> Iterator[TestClient]:
    with client_of(chain) as made:
        yield made


@pytest.mark.parametrize(
    "path",
    [
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/../../etc/passwd",
        "/static/app.js",
        "/app.js%00.css",
        "/api/rows?a=../../etc",
        "/api/rows?a=%2e%2e%2f",
        "/api/rows?a={a}&shard=../../../etc/passwd",
        "/api/row?a={a}&shard=..%2f..%2f_capipe%2fconfig&row=0",
        "/api/image?a={a}&shard=..%2F..%2F00000&row=0",
        "/api/image?a=shards&shard=00000&row=0",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_path_leads_out_of_the_list(client: TestClient, path: str) -> None:
    response = client.get(path.format(a=id_of("captions")))
    assert response.status_code == 404
    assert "root:" not in response.text and "fingerprint" not in response.text


def test_only_reading_is_answered(client: TestClient) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, "/api/catalog").status_code == 405


def test_other_names_and_other_sites_are_refused(client: TestClient) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:8642", "", "a b", "10.0.0.7:8642"):
        assert client.get("/api/catalog", headers={"host": host}).status_code == 421, host
    for host in ("localhost", "127.0.0.1:9999", "[::1]:8642", "LOCALHOST:8642"):
        assert client.get("/api/catalog", headers={"host": host}).status_code == 200, host
    asked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/api/image", headers=asked).status_code == 403


def test_a_token_lets_in_by_address_once_by_cookie_and_by_header(chain: Path) -> None:
    token = "a-token-of-some-length"
    with client_of(chain, token, "192.0.2.7") as client:
        for wrong in ({}, {"token": ""}, {"token": "a-token-of-some-lengtH"}, {"token": token + "x"}):
            assert client.get("/", params=wrong).status_code == 401
        assert client.get("/api/catalog", params={"token": token}).status_code == 401
        assert client.get("/api/catalog", headers={"authorization": "Bearer nonsense é".encode()}).status_code == 401
        assert client.get("/api/catalog", headers={"authorization": f"Bearer {token}"}).status_code == 200
        first = client.get("/", params={"token": token, "tab": "compare", "filter": "a > 1"})
        assert first.status_code == 303 and first.headers["location"] == "/?tab=compare&filter=a+%3E+1"
        cookie = first.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and token not in first.headers["location"]
        assert client.get("/").status_code == 200
        assert client.get("/api/catalog").status_code == 200
        assert client.get("/api/catalog", headers={"host": "evil.example"}).status_code == 421


def test_a_token_is_made_up_unless_loopback_does_without() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
        made = {chosen_token(host, None) for _ in range(3)}
        assert len(made) == 3 and all(token and len(token) >= 32 for token in made)
    assert chosen_token("127.0.0.1", None, no_token=True) is None and chosen_token("::1", None, no_token=True) is None
    with pytest.raises(BadInput, match="--no-token"):
        chosen_token("0.0.0.0", None, no_token=True)
    with pytest.raises(BadInput, match="give one of them"):
        chosen_token("127.0.0.1", "a-token-of-some-length", no_token=True)
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org") and is_loopback("localhost")
    with pytest.raises(BadInput, match="--token"):
        chosen_token("127.0.0.1", "short")


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    write_images(tmp_path / "shards", [2])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: in use already" in one_line(capipe("view", tmp_path, "--port", port, code=2))
    with pytest.raises(BadInput, match="no address of that name"):
        listen("no.such.host.invalid", 0)


def test_no_token_beyond_loopback_is_one_line(chain: Path) -> None:
    refused = capipe("view", chain, "--port", 0, "--host", "0.0.0.0", "--no-token", code=2)
    assert "leave --no-token out" in one_line(refused)


def test_a_folder_without_artifacts_is_one_line(tmp_path: Path) -> None:
    assert "no artifact" in one_line(capipe("view", tmp_path, "--port", 0, code=2))
    assert "no such folder" in one_line(capipe("view", tmp_path / "gone", "--port", 0, code=2))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command_serves_until_it_is_stopped(chain: Path, host: str) -> None:
    """Who has the printed link looks; on loopback, too, nobody else does."""
    command = [sys.executable, "-m", "capipe.pipeline", "view", str(chain), "--port", "0", "--host", host]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        address, token = line.strip().rpartition(": ")[2].split("?token=")
        port = address.rstrip("/").rpartition(":")[2]
        for _ in range(50):
            try:
                refused = httpx.get(f"http://127.0.0.1:{port}/api/catalog")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        assert refused.status_code == 401
        told = httpx.get(f"http://127.0.0.1:{port}/api/catalog", headers={"authorization": f"Bearer {token}"})
        assert len(told.json()["artifacts"]) == 2
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", follow_redirects=True) as visitor:
            assert visitor.get("/", params={"token": token}).status_code == 200
            assert visitor.get("/api/catalog").status_code == 200
    finally:
        running.terminate()
        running.wait(20)
