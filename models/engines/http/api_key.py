"""The API key of servers: its validity, and which hosts receive it.

It is sent to hosts that the user named: on a command line, or for a recipe, which others may have written, by
``--allow-host`` or ``$CAPIPE_API_HOSTS``; this computer always receives it. Over plain http, where anyone on the path
can read it, it is sent only to private networks, and to hosts that were allowed by name.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from ....errors import BadInput
from ....manifests.files.redaction import API_KEY_VARIABLE, api_key

HOSTS_VARIABLE = "CAPIPE_API_HOSTS"
#: Endings of names that no public server has (RFC 6761, 6762, 8375; ICANN's .internal).
PRIVATE_NAMES = (".local", ".internal", ".lan", ".home.arpa", ".localhost", ".test")
_SHARED = ipaddress.ip_network("100.64.0.0/10")  # carrier-grade NAT and overlay networks (RFC 6598)
_URL = re.compile(r"https?://[^\s,\"'\]}]+", re.I)


def checked_key() -> str:
    """The key, empty where there is none. Raises BadInput for one that cannot be valid."""
    key = api_key()
    wrong = [character for character in key if not "!" <= character <= "~"]
    if wrong:
        kind = "characters that are not ASCII" if not key.isascii() else "blanks or control characters in it"
        raise BadInput(f"${API_KEY_VARIABLE}: has {kind}, which no key has; was more than the key copied?")
    return key


def authorization(url: str) -> dict[str, str]:
    """The header with the key for the server at ``url``; empty without a key. Raises BadInput where it must not go.

    A URL with a user gets that instead, by httpx.
    """
    key = checked_key()
    if not key or has_user(url):
        return {}
    host = host_of(url)
    if urlsplit(url).scheme != "https" and host not in allowed_hosts() and not is_private(host):
        raise BadInput(
            f"--engine: {host} is no private address, and over http:// everybody on the way reads ${API_KEY_VARIABLE}; "
            f"take https://, unset the key, or set {HOSTS_VARIABLE}={host} to send it all the same"
        )
    return {"Authorization": f"Bearer {key}"}


def allowed_hosts() -> tuple[str, ...]:
    """Hosts that the user allowed by name."""
    return tuple(name.strip().lower() for name in os.environ.get(HOSTS_VARIABLE, "").split(",") if name.strip())


def allow(hosts: Iterable[str]) -> None:
    """Let ``hosts`` receive the key, in this process and its children. Raises BadInput for what is no host name."""
    for host in hosts:
        if not host.strip() or any(character in host for character in "/,@ ") or _has_port(host):
            raise BadInput(f"--allow-host {host!r}: is no name of a host; write it alone, as in api.example.com")
        os.environ[HOSTS_VARIABLE] = ",".join([*allowed_hosts(), host.strip()])


def check_recipe_hosts(where: str, engines: Iterable[str], named: Sequence[str] = ()) -> None:
    """Raise BadInput where a recipe uses a host that would receive the key although the user has not named it.

    ``engines``: engines given in the recipe ``where``. ``named``: texts of the command line, with hosts or not.
    """
    if not checked_key():
        return
    typed = {host_of(url) for text in named for url in _URL.findall(text)}
    urls = [url.strip() for engine in engines if "://" in engine for url in engine.split(",")]
    for host in dict.fromkeys(host_of(url) for url in urls if not has_user(url)):
        if host and not (is_loopback(host) or host in allowed_hosts() or host in typed):
            raise BadInput(
                f"{where}: asks {host}, which would get ${API_KEY_VARIABLE}; if it is meant to, add --allow-host {host}"
            )
    for url in urls:
        authorization(url)


def host_of(url: str) -> str:
    """The host in lower case; empty where a URL has none."""
    try:
        return (urlsplit(url.strip()).hostname or "").lower()
    except ValueError:
        return ""


def has_user(url: str) -> bool:
    return "@" in url.partition("://")[2].partition("/")[0]


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback)


def is_private(host: str) -> bool:
    """Whether a host is in a private network: by its address, its name, or all that its name resolves to."""
    address = _address(host)
    if address is not None:
        return _is_private(address)
    if "." not in host or host.endswith(PRIVATE_NAMES):
        return True
    try:
        resolved = [str(info[4][0]) for info in socket.getaddrinfo(host, None)]
    except OSError:  # nothing will be sent
        return True
    addresses = [_address(text.partition("%")[0]) for text in resolved]
    return all(address is not None and _is_private(address) for address in addresses)


def _is_private(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_private or (address.version == 4 and address in _SHARED)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _has_port(host: str) -> bool:
    return ":" in host and _address(host.strip("[]")) is None
