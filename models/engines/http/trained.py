"""New weights for vLLM servers in development mode: the commands outside OpenAI's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import httpx

from ..base import EngineDead, RequestError
from ..vllm.weight_sync import EXTENSION, PRECISION, RELOAD, Precision
from .answers import read_complaint
from .exchange import exchange
from .server import Connections, base_url


class Address(Protocol):
    """A server's URL, and the seconds that an answer may take."""

    @property
    def url(self) -> str: ...

    @property
    def timeout_s(self) -> float: ...


class TrainedServer:
    """Implements :class:`..vllm.weight_sync.Trained` for an idle server with our extension in its workers."""

    _options: Address
    _connections: Connections

    async def precision(self) -> Precision:
        """What the server computes in. Raises EngineDead."""
        answer = await self._command("collective_rpc", {"method": PRECISION})
        try:
            return Precision(**answer.json()["results"][0])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EngineDead(f"{self._options.url}: does not say what it computes in: {error!r}") from error

    async def reload(self, folder: Path, everything: bool = True) -> None:
        """Make the server read new weights from a folder that it can access, and drop what the old ones computed.

        ``everything``: or only those that training changes. Raises EngineDead.
        """
        await self._command("collective_rpc", {"method": RELOAD, "args": [str(folder), everything]})
        await self.forget()

    async def weight_update(self, command: str, **arguments: Any) -> None:
        """A command of vLLM's own weight transfer. Raises EngineDead."""
        await self._command(command, arguments or None)

    async def workers(self) -> int:
        """Number of the server's worker processes, each of which receives weights. Raises EngineDead."""
        answer = await self._command("get_world_size", method="GET")
        try:
            return int(answer.json()["world_size"])
        except (ValueError, KeyError, TypeError) as error:
            raise EngineDead(f"{self._options.url}: does not say how many workers it has: {error!r}") from error

    async def forget(self) -> None:
        """Empty the caches that older weights filled. Raises EngineDead."""
        emptied = await self._command("reset_prefix_cache")
        await self._command("reset_mm_cache")
        await self._command("reset_encoder_cache")
        if b"true" not in emptied.content:
            raise EngineDead(f"{self._options.url}: its prefix cache is in use and could not be emptied")

    async def _command(self, name: str, body: dict[str, Any] | None = None, method: str = "POST") -> httpx.Response:
        """One of the server's own commands, which are outside the protocol's root."""
        url = base_url(self._options.url).removesuffix("v1/") + name
        try:
            with self._connections.pool() as client:
                response = await exchange(client, method, url, self._options.timeout_s, body)
        except (httpx.HTTPError, RequestError) as error:
            raise EngineDead(f"{url}: {type(error).__name__}: {error}") from error
        if response.status_code == httpx.codes.NOT_FOUND:
            raise EngineDead(
                f"{url}: no such command; start the server with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls "
                f"{EXTENSION}"
            )
        if not response.is_success:
            raise EngineDead(f"{url}: HTTP {response.status_code}: {read_complaint(response).message}")
        return response
