"""An S3 server that misbehaves on request: a proxy before moto's, and what a test needs to look behind it."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest

ERRORS = {403: "AccessDenied", 404: "NoSuchBucket", 500: "InternalError", 501: "NotImplemented", 503: "SlowDown"}
#: An HTTP status; "reset": before the request is done; "lost": after; "hang"; "late": when released; None: as moto says
Fate = int | str | None


class StoreProxy:
    """``fate(method, path, headers)`` decides about each request; ``path`` has the query. ``requests``: all of them.

    ``conditional`` False: the store heeds no If-None-Match. Conditional writes are one step here, as they are in S3.
    """

    def __init__(self, moto: str) -> None:
        self.fate: Callable[[str, str, Any], Fate] = lambda method, path, headers: None
        self.conditional = True
        self.requests: list[tuple[str, str]] = []
        self.released = threading.Event()
        self._step = threading.Lock()
        proxy, upstream = self, urlsplit(moto)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append((self.command, self.path))
                fate = proxy.fate(self.command, self.path, self.headers)
                if fate in ("hang", "late"):
                    proxy.released.wait(60 if fate == "hang" else 300)
                    fate = "reset" if fate == "hang" else None
                if isinstance(fate, int):
                    self.refuse(fate)
                elif fate == "reset":
                    self.reset()
                else:
                    status, headers, data = self.forward(body)
                    if fate == "lost":
                        self.reset()
                    else:
                        self.reply(status, headers, data)

            def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                if not proxy.conditional:
                    headers.pop("If-None-Match", None)
                connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
                with proxy._step if "If-None-Match" in headers else threading.Lock():
                    connection.request(self.command, self.path, body, headers)
                    response = connection.getresponse()
                    data = response.read()
                connection.close()
                return response.status, response.getheaders(), data

            def reply(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
                self.send_response_only(status)
                length = None
                for name, value in headers:
                    if name.lower() == "content-length":
                        length = value
                    elif name.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def refuse(self, status: int) -> None:
                text = f"<Error><Code>{ERRORS[status]}</Code><Message>said the test</Message></Error>"
                data = b"" if self.command == "HEAD" else text.encode()
                self.reply(status, [("Content-Type", "application/xml")], data)

            def reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

            def finish(self) -> None:
                with suppress(OSError, ValueError):
                    super().finish()

            def log_message(self, *_: object) -> None: ...

        for verb in ("GET", "PUT", "POST", "HEAD", "DELETE"):
            setattr(Handler, f"do_{verb}", Handler.answer)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, part: str = "") -> int:
        """How many requests of this kind there were whose path has ``part``."""
        return sum(verb == method and part in path for verb, path in self.requests)


def forget_stores() -> None:
    """Open file systems have the address of the server that was theirs when they were made."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def proxied(monkeypatch: pytest.MonkeyPatch, moto: str, patience: float = 0.0) -> Iterator[StoreProxy]:
    """Everything goes through a proxy; passing errors are tried again for ``patience`` seconds."""
    proxy = StoreProxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("CAPIPE_STORE_PATIENCE", str(patience))
    forget_stores()
    try:
        yield proxy
    finally:
        proxy.close()
        forget_stores()
