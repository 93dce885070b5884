"""Requests that never become whole: they are ended in time, and whoever asks a whole one is answered meanwhile."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from unittest import mock

import pytest

pytest.importorskip("fastapi", reason="the viewer needs capipe[view]")
import httpx

from capipe.pipeline.view.app import create_app
from capipe.pipeline.view.connections import BoundedProtocol, server_of
from capipe.pipeline.view.library import Library
from capipe.pipeline.view.server import guarded, listen

from .looking import write_images

TOKEN = "a-token-for-this-test"
SECONDS = 2.0


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("view")
    write_images(folder / "shards", [3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundedProtocol, "request_seconds", SECONDS)
        listening = listen("127.0.0.1", 0)
        bound = int(listening.getsockname()[1])
        server = server_of(guarded(create_app(Library(folder)), "127.0.0.1", bound, TOKEN))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:  # until then the kernel keeps 64 waiting, and more of them come in no order
            time.sleep(0.01)
        yield bound
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def client(port: int) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {TOKEN}"}, timeout=10)


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(4096) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def half_sent(port: int, data: bytes = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=10)
    made.sendall(data)
    return made


def test_half_sent_requests_are_ended_while_whole_ones_are_answered(port: int) -> None:
    started = time.monotonic()
    waiting = [half_sent(port) for _ in range(300)]
    with client(port) as visitor:
        assert len(visitor.get("/api/catalog").json()["artifacts"]) == 1
    while time.monotonic() < started + SECONDS + 15 and any(map(is_open, waiting)):
        time.sleep(0.1)
    assert not any(map(is_open, waiting))
    for each in waiting:
        each.close()


def test_a_burst_ends_as_many_as_are_over_the_limit() -> None:
    """All of them come before the loop tells any that it was ended, as when the viewer was busy for a while."""

    async def burst() -> list[mock.Mock]:
        server = server_of(mock.Mock())
        server.config.load()
        transports = [mock.Mock(spec=asyncio.Transport) for _ in range(BoundedProtocol.most + 5)]
        for transport in transports:
            transport.get_extra_info.return_value = None
            BoundedProtocol(server.config, server.server_state, {}).connection_made(transport)
        return transports

    transports = asyncio.run(burst())
    assert [each.abort.call_count for each in transports] == [1] * 5 + [0] * BoundedProtocol.most


@pytest.mark.parametrize(
    "first", [b"", b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"]
)
def test_a_byte_now_and_then_buys_no_time(port: int, first: bytes) -> None:
    dripping = half_sent(port, first)
    started = time.monotonic()
    with pytest.raises(ConnectionError):
        while time.monotonic() < started + SECONDS + 15:
            dripping.sendall(b"x")
            time.sleep(0.1)
    assert time.monotonic() >= started + SECONDS / 2
    dripping.close()


def test_a_connection_that_asks_again_and_again_stays(port: int) -> None:
    with client(port) as visitor:
        for _ in range(4):
            assert visitor.get("/api/catalog").status_code == 200
            time.sleep(SECONDS / 2.5)
        pool = visitor._transport._pool  # type: ignore[attr-defined]
        assert len(pool.connections) == 1
