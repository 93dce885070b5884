"""Server URLs: their validity, whether servers answer, and what they serve."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx

from ....errors import BadInput
from ....manifests.files.redaction import API_KEY_VARIABLE, HIDDEN, note
from ..base import RequestError
from .api_key import authorization
from .exchange import exchange, run_apart

CONNECT_SECONDS = 10.0
POOL = 8  # connections per pool
EXTENDED_SERVERS = ("vllm", "sglang")  # as named in /v1/models: they take more than OpenAI's fields


class NoAnswer(BadInput):
    """No server answers at a URL, or it is not ready; of several servers, another may answer."""


class NotReady(NoAnswer):
    """A server answers that it is not ready yet."""


class Connections:
    """A server's connections, in small pools: httpx scans all connections of a pool twice for each request.

    With a single pool, 256 concurrent requests took fourteen times as long as the server that answered them.
    """

    def __init__(self, base: str, timeout: httpx.Timeout) -> None:
        self._base, self._timeout, self._headers = base, timeout, authorization(base)
        self._certificates = httpx.create_ssl_context()  # read once: it takes longer than a request
        self._pools = list[httpx.AsyncClient]()
        self._free = list[int]()  # a heap: the lowest are reused, so that few connections are open
        self._taken = 0

    @contextmanager
    def pool(self) -> Iterator[httpx.AsyncClient]:
        """A client with a free connection, or with room for one more."""
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot, self._taken = self._taken, self._taken + 1
        try:
            yield self._client(slot // POOL)
        finally:
            heapq.heappush(self._free, slot)

    async def aclose(self) -> None:
        for client in self._pools:
            await client.aclose()

    def _client(self, number: int) -> httpx.AsyncClient:
        while len(self._pools) <= number:
            self._pools.append(
                httpx.AsyncClient(
                    base_url=self._base,
                    headers=self._headers,
                    verify=self._certificates,
                    limits=httpx.Limits(max_connections=None, max_keepalive_connections=POOL),
                    timeout=self._timeout,
                )
            )
        return self._pools[number]


def server_urls(option: str) -> tuple[str, ...]:
    """The URLs of ``http://one:8000,http://two:8000``. Raises BadInput with the first invalid one."""
    note([option])
    urls = tuple(part.strip() for part in option.split(","))
    for url in urls:
        if reason := _fault(url):
            raise BadInput(
                f"--engine {_shown(option)!r}: {_shown(url)!r} {reason}; write http://HOST:PORT, several with commas "
                "between"
            )
    bases = [base_url(url) for url in urls]
    for index, base in enumerate(bases):
        if base in bases[:index]:
            text = f"--engine {_shown(option)!r}: names {_shown(urls[index])!r} twice"
            raise BadInput(f"{text}; a server is asked for all it takes anyway")
    return urls


def _shown(text: str) -> str:
    """URLs for error messages, redacted: text before an @ may be any part of a malformed password."""
    return re.sub(r"//.*@", f"//{HIDDEN}@", text)


def _fault(url: str) -> str:
    """The fault of a URL, empty where it has none."""
    if not url:
        return "is no URL"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL) as error:
        return f"is no URL ({error if '@' not in url else 'percent-encode what is special in user and password'})"
    if parts.scheme not in ("http", "https"):
        return "is no http:// or https:// URL"
    if not host or any(character.isspace() for character in url):
        return "names no host" if not host else "has a space in it"
    if "@" in parts.path:  # a slash in a password ends the host part
        return "has an @ in its path; percent-encode what is special in user and password"
    return "has a query or a fragment" if parts.query or parts.fragment else ""


def base_url(url: str) -> str:
    """``http://host:8000`` and ``http://host:8000/v1/`` normalised to ``http://host:8000/v1/``."""
    trimmed = url.rstrip("/")
    return f"{trimmed}/" if trimmed.endswith("/v1") else f"{trimmed}/v1/"


def served_model(option: str, model: str = "") -> str:
    """The model that the servers of ``option`` serve: ``model``, or their first one.

    Asks each server. Raises BadInput where none answers, one does not have the model, or they have different ones; of
    several, some may be down.
    """
    return common_model({url: chosen for url, (_, chosen) in _asked(option, model).items()})


def served_context(option: str, model: str = "") -> int | None:
    """The shortest context that the servers of ``option`` report for their model; None where none does.

    Raises BadInput as :func:`served_model` does.
    """
    contexts = [model_context(response, chosen) for response, chosen in _asked(option, model).values()]
    return min((length for length in contexts if length is not None), default=None)


def takes_extensions(option: str, model: str = "") -> bool:
    """Whether all servers of ``option`` that answer take more than OpenAI's fields. Raises BadInput."""
    answers = _asked(option, model).items()
    return all(
        listed_models(response, base_url(url))[chosen] in EXTENDED_SERVERS for url, (response, chosen) in answers
    )


def _asked(option: str, model: str) -> dict[str, tuple[httpx.Response, str]]:
    """Model list and chosen model of the servers that answer, by URL; at least one."""
    answers, down = dict[str, tuple[httpx.Response, str]](), list[NoAnswer]()
    for url in server_urls(option):
        base = base_url(url)
        try:
            response = run_apart(_models_of(base))
            answers[url] = response, chosen_model(listed_models(response, base), model, base)
        except httpx.HTTPError as error:
            down.append(no_answer(base, error))
        except NoAnswer as error:
            down.append(error)
    if not answers:
        raise none_answers(down)
    return answers


async def _models_of(base: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=base, headers=authorization(base), timeout=CONNECT_SECONDS) as client:
        return await models(client)


async def models(client: httpx.AsyncClient) -> httpx.Response:
    """A server's model list. Raises httpx.HTTPError, and BadInput where the response is too large."""
    try:
        return await exchange(client, "GET", "models", CONNECT_SECONDS)
    except RequestError as error:
        raise BadInput(f"{client.base_url}models: {error}; is the URL an OpenAI API?") from error


def common_model(chosen: Mapping[str, str]) -> str:
    """The one model that all servers, by URL, serve. Raises BadInput."""
    if len(set(chosen.values())) > 1:
        pairs = ", ".join(f"{url} {name!r}" for url, name in chosen.items())
        raise BadInput(f"the servers serve different models ({pairs}); name one that all have by --model")
    return next(iter(chosen.values()))


def chosen_model(models: Mapping[str, str], model: str, base: str) -> str:
    """``model`` or the first of ``models``. Raises BadInput."""
    if model and model not in models:
        raise BadInput(f"{base} does not serve {model!r}; it serves {', '.join(models)}")
    return model or next(iter(models))


def none_answers(reasons: Sequence[NoAnswer]) -> NoAnswer:
    """The error where all of several servers are down."""
    if len(reasons) == 1:
        return reasons[0]
    return NoAnswer("none of the servers answers: " + "; ".join(map(str, reasons)))


def listed_models(response: httpx.Response, base: str) -> dict[str, str]:
    """Model names and their owners, at least one. Raises BadInput."""
    if response.status_code in (401, 403):
        raise BadInput(f"{base} refuses the key (HTTP {response.status_code}); set {API_KEY_VARIABLE}")
    if response.status_code in (429, *range(500, 600)):
        raise NotReady(f"{base}models: HTTP {response.status_code}; wait until the server is ready")
    try:
        listed = {entry["id"]: str(entry.get("owned_by", "")) for entry in response.raise_for_status().json()["data"]}
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{base}models lists no models ({type(error).__name__}); is the URL an OpenAI API?") from error
    if not listed:
        raise BadInput(f"{base} serves no model")
    return listed


def model_context(response: httpx.Response, model: str) -> int | None:
    """The context of a listed model; vLLM reports it, OpenAI's protocol has no field for it."""
    context = next((entry.get("max_model_len") for entry in response.json()["data"] if entry["id"] == model), None)
    return context if type(context) is int and context > 0 else None


def no_answer(base: str, error: httpx.HTTPError) -> NoAnswer:
    return NoAnswer(f"{base}: no server answers ({type(error).__name__}: {error}); start it or fix --engine")
