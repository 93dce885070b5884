"""`capipe view`: the viewer on a port of this machine."""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from ...errors import BadInput
from ...terminal import print_err, print_line
from .guard import LOOPBACK, App, Guard
from .library import Library

_SHORTEST = 16  # characters of a token


def serve(folder: str | Path, host: str, port: int, token: str | None, images: Sequence[str] = ()) -> None:
    """Serve until Ctrl-C. ``token``: from :func:`chosen_token`; ``images``: see :class:`.library.Library`.

    Raises BadInput if the folder has no artifact, or the address cannot be bound.
    """
    try:
        from .app import create_app
        from .connections import server_of
    except ImportError as error:
        raise BadInput(f"capipe view needs {error.name}; pip install 'capipe[view]'") from None
    library = Library(folder, images)
    pa.table({"rows": [0]}).take([0])  # pyarrow imports pandas on its first take: here, not in the first request
    listening = listen(host, port)
    bound = int(listening.getsockname()[1])
    app = guarded(create_app(library), host, bound, token)
    print_line(f"{folder}: {address(host, bound, token)}")
    print_err("Ctrl-C ends it. Nothing is written.")
    server_of(app).run(sockets=[listening])


def chosen_token(host: str, token: str | None, no_token: bool = False) -> str | None:
    """Token to require: the given one, else a random one; none with ``no_token``, which is allowed on loopback only.

    Required on loopback by default, since other users of this machine can reach it. Raises BadInput for a short token
    and for contradictory options.
    """
    if no_token and token is not None:
        raise BadInput("--token and --no-token: give one of them")
    if no_token and not is_loopback(host):
        raise BadInput(f"--host {host}: without a token everybody who reaches it could look; leave --no-token out")
    if no_token:
        return None
    if token is None:
        return secrets.token_urlsafe(24)
    if len(token) < _SHORTEST or not token.isascii() or not all(c.isalnum() or c in "-_.~" for c in token):
        raise BadInput(f"--token: give at least {_SHORTEST} letters, digits or any of -_.~, or leave it out")
    return token


def is_loopback(host: str) -> bool:
    """Whether a host name or address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket at an address. Raises BadInput if it cannot be bound."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise BadInput(f"--host {host}: no address of that name; use 127.0.0.1, or one of this machine's") from None
    listening = socket.socket(family, kind)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(where)
        listening.listen(64)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise BadInput(f"--port {port}: in use already; give another, or 0 for a free one") from None
        raise BadInput(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from None
    return listening


def guarded(app: App, host: str, port: int, token: str | None) -> Guard:
    """The app behind its guard, configured for the address it listens at."""
    hosts: Sequence[str] = (*LOOPBACK, host) if is_loopback(host) else (*LOOPBACK, host, socket.gethostname())
    return Guard(app, hosts, token, any_address=not is_loopback(host), cookie=f"capipe-{port}")


def address(host: str, port: int, token: str | None) -> str:
    """URL to open."""
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
