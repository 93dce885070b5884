"""Servers that answer without end, too much, or elsewhere: a deadline and a limit for the whole answer."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import resource
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from capipe.errors import BadInput
from capipe.models.engines.base import RequestError
from capipe.models.engines.http.answers import Unavailable
from capipe.models.engines.http.engine import connect_http_engine
from capipe.models.engines.http.exchange import MOST_BYTES, TooLarge, Unpacking
from capipe.models.engines.http.server import CONNECT_SECONDS, NoAnswer, served_model

from ..chat_server import ASK, Double, ask, completion, options, serving

Writing = Callable[[BaseHTTPRequestHandler], None]
MODELS = b'{"data": [{"id": "captioner"}]}'


@contextmanager
def answering(models: Writing, chat: Writing) -> Iterator[str]:
    """A server whose handlers write what they like."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            models(self)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.close_connection = True
            chat(self)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hangs up is no error here."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def whole(content: bytes, *headers: tuple[str, str]) -> Writing:
    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        for name, value in (*headers, ("content-length", str(len(content)))):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return write


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """A byte each 0.2 s."""
    content = json.dumps(completion("x")[2]).encode()
    handler.send_response(200)
    handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    for place in range(len(content)):
        handler.wfile.write(content[place : place + 1])
        time.sleep(0.2)


def dripping_headers(handler: BaseHTTPRequestHandler) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nx-header: " + 100 * b"x":
        handler.wfile.write(bytes([byte]))
        time.sleep(0.2)


@pytest.mark.parametrize("drip", [dripping, dripping_headers])
async def test_an_answer_that_drips_is_given_up_at_the_deadline(drip: Writing) -> None:
    with answering(whole(MODELS), drip) as url:
        engine = await connect_http_engine(options(url, timeout_s=1.0, attempts=2, backoff_s=0.01))
        with pytest.raises(Unavailable, match="ReadTimeout: no whole answer within 1 s"):
            await engine.generate(ASK)
        await engine.aclose()


def test_a_list_of_models_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capipe.models.engines.http.server.CONNECT_SECONDS", 1.0)
    assert CONNECT_SECONDS == 10.0
    with answering(dripping, dripping) as url:
        with pytest.raises(NoAnswer, match="no whole answer within 1 s"):
            served_model(url)
        with pytest.raises(NoAnswer, match="no whole answer within 1 s"):
            asyncio.run(connect_http_engine(options(url)))


def bomb(megabytes: int) -> bytes:
    """Gzip of an answer with so many MB of blanks in it."""
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb") as packed:
        packed.write(b'{"choices": [')
        for _ in range(megabytes):
            packed.write(b" " * 1_000_000)
        packed.write(b"]}")
    return file.getvalue()


async def test_an_answer_that_unpacks_to_too_much_is_one_rows_error() -> None:
    packed = bomb(150)
    assert len(packed) < 200_000
    double = Double(lambda n, body: (200, {"content-encoding": "gzip"}, packed) if n % 2 else completion("x"))
    with serving(double) as url:
        engine = await connect_http_engine(options(url))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for n in range(6):
            if n % 2:
                with pytest.raises(RequestError, match="over 16 MB") as caught:
                    await engine.generate(ASK)
                assert not caught.value.final
            else:
                assert (await engine.generate(ASK)).text == "x"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80_000  # kB; 150 MB were unpacked before
        await engine.aclose()
    assert len(double.bodies) == 6  # not asked for again


async def test_a_complaint_and_a_list_of_models_are_bounded_too() -> None:
    huge = b'{"error": {"message": "' + b"x" * (MOST_BYTES + 1) + b'"}}'
    double = Double(lambda n, body: (400, {}, huge))
    assert "over 16 MB" in str(await ask(double))
    with answering(whole(bomb(20), ("content-encoding", "gzip")), dripping) as url:
        with pytest.raises(BadInput, match="over 16 MB"):
            served_model(url)
        with pytest.raises(BadInput, match="over 16 MB"):
            await connect_http_engine(options(url))


async def test_answers_may_be_packed_as_servers_do() -> None:
    content = json.dumps(completion("A dog.")[2]).encode()
    bare = zlib.compressobj(wbits=-15)
    forms = {
        "gzip": gzip.compress(content),
        "deflate": zlib.compress(content),
        "DEFLATE": bare.compress(content) + bare.flush(),
        "identity": content,
    }
    for name, packed in forms.items():
        double = Double(lambda n, body, name=name, packed=packed: (200, {"content-encoding": name}, packed))  # type: ignore[misc]
        assert (await ask(double)).text == "A dog."
        assert double.headers[0]["accept-encoding"] == "gzip, deflate"
    double = Double(lambda n, body: (200, {"content-encoding": "br"}, content))
    assert "is packed by 'br'" in str(await ask(double)) and len(double.bodies) == 1


def test_the_limit_is_met_to_the_byte_in_pieces_of_any_size() -> None:
    content = bytes(100_000)
    packed = gzip.compress(content)
    for step in (1, 7, len(packed)):
        for most, fits in ((100_000, True), (99_999, False)):
            unpacking, got = Unpacking("gzip", most), bytearray()
            try:
                for place in range(0, len(packed), step):
                    got += unpacking.add(packed[place : place + step])
                unpacking.finish()
            except TooLarge:
                assert not fits and len(got) <= most
            else:
                assert fits and got == content
    with pytest.raises(httpx.DecodingError):
        Unpacking("gzip").add(b"no gzip at all")


async def test_an_answer_nested_without_end_is_no_crash() -> None:
    deep = b'{"choices": ' + b"[" * 200_000
    assert "broke on its way" in str(await ask(Double(lambda n, body: (200, {}, deep))))
    refused = b'{"error": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    assert "HTTP 400" in str(await ask(Double(lambda n, body: (400, {}, refused))))
    with answering(whole(b'{"data": ' + b"[" * 200_000), dripping) as url, pytest.raises(BadInput, match="lists no"):
        served_model(url)


async def test_a_redirect_is_not_followed_and_the_key_not_shown_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIPE_API_KEY", "secret")
    other = Double(lambda n, body: completion("from elsewhere"))
    with serving(other) as elsewhere:
        for status in (301, 302, 307, 308):
            double = Double(lambda n, body, status=status: (status, {"location": elsewhere}, {}))  # type: ignore[misc]
            said = str(await ask(double))
            assert f"HTTP {status}" in said and elsewhere in said and double.headers[0]["authorization"]

        def moved(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(307)
            handler.send_header("location", f"{elsewhere}/v1/models")
            handler.send_header("content-length", "0")
            handler.end_headers()

        with answering(moved, moved) as url, pytest.raises(BadInput, match="lists no models"):
            served_model(url)
    assert not other.bodies and not other.paths
