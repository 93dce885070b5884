"""Access control of the viewer: tokens, host names, security headers.

Only GET and HEAD are answered. Other sites' pages cannot send requests (cross-site requests are refused by their
Sec-Fetch headers, DNS rebinding by the check of the host name), and nothing from data can run or load.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

HEADERS: tuple[Header, ...] = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:\d+)?")


class Guard:
    """ASGI middleware. ``hosts``: accepted host names; ``any_address``: also accept numeric addresses, which are safe
    from DNS rebinding; ``token``: required token, None for none."""

    def __init__(
        self, app: App, hosts: Iterable[str], token: str | None, *, any_address: bool = False, cookie: str = "capipe"
    ) -> None:
        self._app, self._token, self._cookie = app, token, cookie
        self._hosts = {host.lower() for host in hosts}
        self._any_address = any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets here
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, "this page only shows; there is nothing to change", (b"allow", b"GET, HEAD"))
        elif not self._known_host(headers.get(b"host", "")):
            await _answer(send, 421, "asked under a name that is not this server's; open the address that was printed")
        elif headers.get(b"sec-fetch-site") == "cross-site" and headers.get(b"sec-fetch-mode") != "navigate":
            await _answer(send, 403, "asked for by another site")
        elif self._token is not None and not self._entitled(headers):
            await self._admit(scope, send)
        else:
            await self._app(scope, receive, _with_headers(send))

    def _known_host(self, value: str) -> bool:
        match = _HOST.fullmatch(value.strip())
        if match is None:
            return False
        host = match[1].strip("[]").lower().rstrip(".")
        if host in self._hosts:
            return True
        if not self._any_address:
            return False
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def _entitled(self, headers: dict[bytes, str]) -> bool:
        kind, _, bearer = headers.get(b"authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(bearer.strip()):
            return True
        try:
            cookie = SimpleCookie(headers.get(b"cookie", "")).get(self._cookie)
        except CookieError:
            return False
        return cookie is not None and self._is_token(cookie.value)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), (self._token or "").encode())

    async def _admit(self, scope: Scope, send: Send) -> None:
        """Exchange the token in the first visit's URL for a cookie, and redirect to the URL without it."""
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["path"] == "/" and any(name == "token" and self._is_token(value) for name, value in pairs):
            rest = urlencode([pair for pair in pairs if pair[0] != "token"])
            # Lax, not Strict: shared links are followed from other sites, and the page is read-only.
            cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Lax"
            target = f"/?{rest}" if rest else "/"
            await _answer(send, 303, "", (b"location", target.encode()), (b"set-cookie", cookie.encode()))
            return
        await _answer(send, 401, "a token is needed: open the address that `capipe view` printed")


def _with_headers(send: Send) -> Send:
    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *HEADERS]
        await send(message)

    return sent


async def _answer(send: Send, code: int, text: str, *more: Header) -> None:
    body = f"capipe view: {text}\n".encode() if text else b""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *more]
    headers += [(b"cache-control", b"no-store"), *HEADERS]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
