"""Files by HTTP whose URLs data names: which addresses, how long, how much."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from capipe.manifests.files.outside import ANYWHERE, Reach, Refused
from capipe.manifests.status import Status
from capipe.stages.reading import files
from capipe.stages.reading import http as http_fetch
from capipe.stages.reading.files import read_file, read_head
from capipe.stages.reading.http import address_problem, fetch

from ...conftest import photo

A = photo(1)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.0.1",
        "::ffff:169.254.169.254",
        "::ffff:a9fe:a9fe",
        "::169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "fe80::1",
        "fe80::1%eth0",
        "[fe80::1]",
        "fd00:ec2::254",
        "fd20:ce::254",
        "100.100.100.200",
        "::ffff:100.100.100.200",
        "168.63.129.16",
    ],
)
@pytest.mark.parametrize("public_only", [False, True])
def test_addresses_that_are_never_asked(address: str, public_only: bool) -> None:
    assert "credentials" in str(address_problem(address, public_only))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "::1",
        "::ffff:127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "fc00::1",
        "fd12::1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::1",
    ],
)
def test_private_addresses_are_refused_by_an_option(address: str) -> None:
    assert address_problem(address) is None and "--public-only" in str(address_problem(address, True))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "example.org"])
def test_public_addresses(address: str) -> None:
    assert address_problem(address) is None and address_problem(address, True) is None


class _Server(BaseHTTPRequestHandler):
    """Answers each path by a function of the handler."""

    answers: ClassVar[dict[str, Callable[[Any], None]]] = {}
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        type(self).seen.append(self.path)
        self.answers[self.path.partition("?")[0]](self)

    def give(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_Server, "seen", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def to(url: str) -> Callable[[Any], None]:
    return lambda handler: handler.give(b"", 302, Location=url)


def test_one_get_for_a_file_and_for_its_head(server: str) -> None:
    _Server.answers = {"/a.jpg": lambda handler: handler.give(A)}
    assert read_file(f"{server}/a.jpg") == (A, None) and _Server.seen == ["/a.jpg"]
    assert read_file("a.jpg", server) == (A, None)
    head = read_head(f"{server}/a.jpg")
    assert head is not None and A.startswith(head)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://169.254.169.254/latest/meta-data/", "credentials"),
        ("http://[::ffff:169.254.169.254]/", "credentials"),
        ("http://metadata.google.internal/computeMetadata/v1/", "credentials"),
        ("file:///etc/hostname", "no http or https URL"),
        ("ftp://127.0.0.1/x", "no http or https URL"),
        ("reference://k::x", "no http or https URL"),
        ("/again", "over 5 redirects"),
    ],
)
def test_where_a_redirect_may_not_lead(server: str, location: str, said: str) -> None:
    _Server.answers = {"/go": to(location), "/again": to("/again"), "/twice": to("/go")}
    for start in ("/go", "/twice"):
        data, problem = read_file(f"{server}{start}")
        assert data is None and problem is not None and problem.status is Status.UNSUPPORTED and said in problem.reason


def test_redirects_are_followed(server: str) -> None:
    _Server.answers = {f"/{n}": to(f"/{n + 1}") for n in range(5)} | {"/5": lambda handler: handler.give(A)}
    assert read_file(f"{server}/0") == (A, None)
    data, problem = read_file(f"{server}/0", reach=Reach(public_only=True))
    assert data is None and problem is not None and "--public-only" in problem.reason


def resolving(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> None:
    """Names as a hostile server of them would resolve them."""
    real = socket.getaddrinfo

    def lookup(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in names:
            return real(host, port, *args, **kwargs)
        kinds = [(socket.AF_INET6 if ":" in each else socket.AF_INET, each) for each in names[host]]
        return [
            (kind, socket.SOCK_STREAM, 6, "", (each, port, 0, 0) if kind == socket.AF_INET6 else (each, port))
            for kind, each in kinds
        ]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@pytest.mark.parametrize(
    "addresses",
    [
        ["169.254.169.254"],
        ["fe80::1"],
        ["169.254.169.254", "100.100.100.200"],
        ["169.254.169.254", "fe80::1", "fd00:ec2::254"],
    ],
)
def test_what_a_name_resolves_to(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    resolving(monkeypatch, {"innocent.example": addresses})
    made: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: made.append(address))
    with pytest.raises(Refused, match="a link-local address"):
        fetch("http://innocent.example/a.jpg", 1000)
    assert made == []


def test_a_name_that_resolves_to_loopback(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    _Server.answers = {"/a.jpg": lambda handler: handler.give(A)}
    resolving(monkeypatch, {"innocent.example": ["127.0.0.1"], "both.example": ["169.254.1.1", "127.0.0.1"]})
    port = server.rpartition(":")[2]
    assert fetch(f"http://innocent.example:{port}/a.jpg", 1 << 20).data == A
    assert fetch(f"http://both.example:{port}/a.jpg", 1 << 20).data == A  # by the address that may be asked
    with pytest.raises(Refused, match="--public-only"):
        fetch(f"http://innocent.example:{port}/a.jpg", 1 << 20, Reach(public_only=True))


@pytest.mark.parametrize("spelled", ["2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518"])
def test_other_spellings_of_an_address(spelled: str) -> None:
    """Whatever the system makes of it: the address itself is looked at."""
    with pytest.raises((Refused, OSError)):
        fetch(f"http://{spelled}:9/a.jpg", 1000)


def test_a_server_that_drips_or_never_answers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_fetch, "DEADLINE_S", 1.0)
    stop = threading.Event()

    def drip(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not stop.wait(0.2):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    _Server.answers = {"/drip": drip, "/silent": lambda handler: stop.wait(30)}
    try:
        for path in _Server.answers:
            begun = time.monotonic()
            data, problem = read_file(f"{server}{path}")
            assert time.monotonic() - begun < 5
            assert problem is not None and problem.status is Status.READ_ERROR and data is None
            assert problem.reason == "cannot be read: no whole answer within 1 s"
    finally:
        stop.set()


@pytest.mark.parametrize("told", [True, False])
def test_an_answer_that_is_too_long(server: str, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    monkeypatch.setattr(files, "MAX_MEMBER_BYTES", 100_000)
    sent = 0

    def flood(handler: Any) -> None:
        nonlocal sent
        handler.send_response(200)
        if told:
            handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        handler.wfile.write(A)
        try:
            while sent < 1 << 28:
                sent += handler.wfile.write(bytes(1 << 16))
        except OSError:
            pass

    _Server.answers = {"/flood": flood}
    data, problem = read_file(f"{server}/flood")
    assert data is None and problem is not None and problem.status is Status.TOO_LARGE
    assert "over the limit of 100000" in problem.reason and sent < 1 << 26


def test_an_answer_that_is_cut_off_is_asked_for_again(server: str) -> None:
    _Server.answers = {"/cut": lambda handler: handler.give(A[:100], Content_Length=str(len(A)))}
    data, problem = read_file(f"{server}/cut")
    assert data is None and problem is not None and problem.status is Status.READ_ERROR


@pytest.mark.parametrize("code", [404, 403, 429, 503])
def test_codes(server: str, code: int) -> None:
    _Server.answers = {"/x": lambda handler: handler.give(b"no", code)}
    _, problem = read_file(f"{server}/x", reach=ANYWHERE)
    assert problem is not None and f"HTTP {code} " in problem.reason
    assert problem.status is (Status.MISSING if code in (403, 404) else Status.READ_ERROR)
