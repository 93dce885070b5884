"""HTTP downloads of URLs found in data: one GET of bounded size and duration, from permitted addresses only.

Addresses are checked when their socket is created, so that no host name, redirect or DNS rebinding bypasses the check
(SSRF). Sessions are those of fsspec, with the client of its configuration.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem

from ...manifests.files.outside import ANYWHERE, Reach, Refused
from ...manifests.files.tar import printable

DEADLINE_S = 120.0  # for the whole response, redirects included
CONNECT_S = 30.0
MAX_REDIRECTS = 5
_PART = 1 << 20  # bytes per read
#: Cloud metadata services (credentials) outside the link-local range: AWS, Google, Alibaba, Azure.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16")))
_METADATA_NAMES = frozenset({"metadata.google.internal", "metadata.goog", "instance-data.ec2.internal"})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Answer:
    """A file's bytes, or its first ones. ``size``: file size if the server reports it; ``whole``: not truncated."""

    data: bytes
    size: int | None
    whole: bool


class _RefusedAddress(OSError):
    """Refused address; an OSError, so that the next address of the host is tried."""


def address_problem(address: str, public_only: bool = False) -> str | None:
    """Reason to refuse a connection to an IP address that comes from data; None if it is permitted."""
    try:
        parsed = ipaddress.ip_address(address.strip("[]").partition("%")[0])
    except ValueError:
        return None  # a host name: its addresses are checked once resolved
    for candidate in _meant(parsed):
        if candidate.is_link_local or candidate in _METADATA:
            return "a link-local address, where clouds keep credentials"
        if public_only and (not candidate.is_global or candidate.is_multicast):
            return "a private or loopback address, refused by --public-only"
    return None


def _meant(address: Address) -> list[Address]:
    """An address, and the IPv4 addresses embedded in it (mapped, 6to4, Teredo, NAT64)."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    held = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64 or (int(address) >> 32 == 0 and int(address) > 1):
        held.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    embedded = [candidate for candidate in held if candidate is not None]
    # ::ffff:8.8.8.8 as such is in a reserved range: only the embedded 8.8.8.8 counts.
    return list(embedded) if address.ipv4_mapped is not None or address in _NAT64 else [address, *embedded]


def fetch(url: str, limit: int, reach: Reach = ANYWHERE) -> Answer:
    """Download the file at an http(s) URL; only its first bytes if it has more than ``limit``.

    Raises Refused for an address that is not permitted, OSError past DEADLINE_S, and the errors of aiohttp.
    """
    fs = _filesystem(os.getpid(), reach.public_only)
    return cast(Answer, sync(fs.loop, _fetch, fs, url, limit, reach.public_only))


@functools.cache
def _filesystem(process: int, public_only: bool) -> HTTPFileSystem:
    """File system of this process: a forked process has no event loop of its own yet."""
    client = functools.partial(_client, public_only=public_only)
    return HTTPFileSystem(get_client=client, skip_instance_cache=True)


async def _client(public_only: bool, **options: Any) -> aiohttp.ClientSession:
    factory = functools.partial(_socket, public_only=public_only)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=factory), **options)


def _socket(endpoint: tuple[Any, ...], public_only: bool) -> socket.socket:
    family, kind, protocol, _, address = endpoint
    problem = address_problem(str(address[0]), public_only)
    if problem is not None:
        raise _RefusedAddress(problem)
    return socket.socket(family, kind, protocol)


async def _fetch(fs: HTTPFileSystem, url: str, limit: int, public_only: bool) -> Answer:
    async def checked(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        """Check the host of each request as written: a proxy would resolve the name itself."""
        host = (request.url.host or "").rstrip(".").lower()
        problem = "a server of credentials" if host in _METADATA_NAMES else address_problem(host, public_only)
        if problem is not None:
            raise Refused(f"{printable(str(request.url)[:200])}: {problem}")
        return await handler(request)

    shown = printable(url[:200])
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S, sock_connect=CONNECT_S)
    options: dict[str, Any] = {"timeout": timeout, "max_redirects": MAX_REDIRECTS + 1, "middlewares": (checked,)}
    try:
        session = await fs.set_session()
        headers = {"Accept-Encoding": "identity"}
        async with session.get(fs.encode_url(url), headers=headers, **options) as response:
            response.raise_for_status()
            return await _answer(response, limit)
    except TimeoutError as error:
        connecting = isinstance(error, aiohttp.ServerTimeoutError)
        text = f"no connection within {CONNECT_S:g} s" if connecting else f"no whole answer within {DEADLINE_S:g} s"
        raise OSError(text) from None
    except aiohttp.TooManyRedirects:
        raise Refused(f"{shown}: over {MAX_REDIRECTS} redirects") from None
    except (aiohttp.NonHttpUrlClientError, aiohttp.InvalidURL) as error:
        raise Refused(
            f"{shown}: it, or what it redirects to, is no http or https URL ({printable(str(error)[:200])})"
        ) from None
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, _RefusedAddress):
            raise Refused(f"{shown}: it, or what it redirects to, has {error.os_error}") from None
        raise OSError(str(error)) from None  # its message has the host


async def _answer(response: aiohttp.ClientResponse, limit: int) -> Answer:
    reported = None if response.headers.get("Content-Encoding") else response.content_length
    wanted = limit if reported is None or reported <= limit else min(limit, _PART)
    data = bytearray()
    while len(data) <= wanted and (part := await response.content.read(_PART)):
        data += part
    whole = len(data) <= limit and (reported is None or reported <= limit)
    if not whole:
        response.close()  # do not wait for the rest
    return Answer(bytes(data[:limit]), reported, whole)
