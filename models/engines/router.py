"""Routing over several servers of one model, with failover: requests about an image go to the same live server."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ...errors import BadInput
from ..images.grid import ImageGrid
from .base import ChoiceRequest, ChoiceScores, Completion, Engine, EngineDead, GenerationRequest, Prompt, Sampling
from .http.answers import SentAway, Unavailable
from .http.engine import THOUGHT_PROBE, HTTPEngine, HTTPOptions, connect_http_engine
from .http.server import NoAnswer, NotReady, common_model, none_answers
from .vllm.weight_sync import Precision

ATTEMPTS = 2  # at one server, before another one is tried
CROWDED = 1.5  # how many times as loaded as the least loaded server one may be before its images go there

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failover:
    """Seconds. ``patience``: how long a request waits at a busy server before it tries another one.

    ``probe``: until an excluded server is asked again, doubled up to ``longest_probe``. ``gone``: how long to look for
    a reachable server where none is left. ``returns``: whether excluded servers rejoin by themselves; otherwise only at
    the next reload, since they may have other weights.
    """

    patience: float = 30.0
    probe: float = 15.0
    longest_probe: float = 300.0
    gone: float = 15.0
    returns: bool = True


class Server:
    """One of the servers. ``engine``: None until it first answers; ``out``: why it is excluded, empty if it is not."""

    def __init__(self, options: HTTPOptions, engine: HTTPEngine | None, out: str, failover: Failover) -> None:
        self.options, self.engine, self.out = options, engine, out
        self.pause = failover.probe
        self.probe_at = time.monotonic() + self.pause
        self.probing: asyncio.Task[None] | None = None
        self.starting = False  # at the last probe it answered, but was not ready

    @property
    def pressure(self) -> float:
        """Load: requests at the server per request that it takes at once."""
        return 0.0 if self.engine is None else self.engine.load / self.engine.concurrency


class EngineRouter:
    """Implements :class:`~.base.Engine` over several servers; made by :func:`connect_servers`.

    A server that is gone, or busy for long without any answer, is excluded and its requests go to the others.
    EngineDead only where none is left.
    """

    grid: ImageGrid | None = None
    guides = True

    def __init__(self, servers: Sequence[Server], patience_s: float, failover: Failover) -> None:
        self._servers, self._patience_s, self._failover = list(servers), patience_s, failover
        self._reviving = asyncio.Lock()

    @property
    def concurrency(self) -> int:
        return max(1, sum(engine.concurrency for _, engine in self._live()))

    @property
    def context(self) -> int | None:
        """The shortest context that a server reports."""
        contexts = [server.engine.context for server in self._servers if server.engine is not None]
        return min((context for context in contexts if context is not None), default=None)

    async def generate(self, request: GenerationRequest) -> Completion:
        return await self._route(request.prompt, lambda engine: engine.generate(request))

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        return await self._route(request.prompt, lambda engine: engine.choose(request))

    def unsupported(self, sampling: Sampling) -> str | None:
        live = (engine.unsupported(sampling) for _, engine in self._live())
        return next((why for why in live if why is not None), None)

    async def thinks(self) -> bool:
        """Asks any one server, since all serve one model."""
        return await self._route(THOUGHT_PROBE, lambda engine: engine.thinks())

    async def count_tokens(self, prompt: Prompt) -> int | None:
        return None

    async def precision(self) -> Precision:
        """What all servers compute in. Raises EngineDead, and BadInput where they differ."""
        found = await asyncio.gather(*(engine.precision() for engine in self._all()))
        if len(set(found)) > 1:
            pairs = ", ".join(f"{server.options.url} {one}" for server, one in zip(self._servers, found, strict=True))
            raise BadInput(f"the servers compute in different types ({pairs}); start all with the same --dtype")
        return found[0]

    async def reload(self, folder: Path, everything: bool = True) -> None:
        """New weights for all servers at once, excluded ones included. Raises EngineDead where one is gone.

        A server that was excluded may have been started anew, and gets all weights.
        """
        engines = self._all()
        await asyncio.gather(
            *(
                engine.reload(folder, everything or bool(server.out))
                for server, engine in zip(self._servers, engines, strict=True)
            )
        )
        self._take_all_back()

    async def workers(self) -> int:
        """Worker processes of all servers together. Raises EngineDead."""
        return sum(await self._workers())

    async def weight_update(self, command: str, **arguments: Any) -> None:
        """A command of vLLM's own weight transfer for all servers. Raises EngineDead.

        Their workers are numbered through, behind the one that sends.
        """
        each = [dict(arguments) for _ in self._servers]
        if command == "init_weight_transfer_engine":
            offset = arguments["init_info"]["rank_offset"]
            for mine, count in zip(each, await self._workers(), strict=True):
                mine["init_info"] = {**arguments["init_info"], "rank_offset": offset}
                offset += count
        engines = zip(self._all(), each, strict=True)
        await asyncio.gather(*(engine.weight_update(command, **mine) for engine, mine in engines))

    async def forget(self) -> None:
        """Empty all servers' caches. Raises EngineDead."""
        await asyncio.gather(*(engine.forget() for engine in self._all()))
        self._take_all_back()

    async def _workers(self) -> list[int]:
        return await asyncio.gather(*(engine.workers() for engine in self._all()))

    def _all(self) -> list[HTTPEngine]:
        """All servers' engines, which new weights need. Raises EngineDead."""
        absent = [server.options.url for server in self._servers if server.engine is None]
        if absent:
            raise EngineDead(f"{', '.join(absent)}: no server answers, and all need the new weights")
        return [server.engine for server in self._servers if server.engine is not None]

    def _take_all_back(self) -> None:
        for server in self._servers:
            if server.out:
                self._take_back(server)

    async def aclose(self) -> None:
        for server in self._servers:
            if server.probing is not None:
                server.probing.cancel()
                await asyncio.gather(server.probing, return_exceptions=True)
            if server.engine is not None:
                await server.engine.aclose()

    def _live(self) -> list[tuple[Server, HTTPEngine]]:
        return [(server, server.engine) for server in self._servers if not server.out and server.engine is not None]

    async def _route(self, prompt: Prompt, ask: Callable[[HTTPEngine], Awaitable[Answer]]) -> Answer:
        """The answer of the prompt's own server, or of another one where that fails."""
        tried = list[Server]()
        failing_since: float | None = None
        while True:
            server, engine = await self._choose_server(prompt, tried)
            began = time.monotonic()
            try:
                answer = await ask(engine)
            except EngineDead as error:
                self._leave_out(server, str(error))
                continue
            except SentAway:
                continue
            except Unavailable as error:
                failing_since = began if failing_since is None else failing_since
                if error.busy and time.monotonic() - failing_since > self._patience_s:
                    raise
                if server.out:  # another request excluded it already
                    continue
                if error.final or not engine.works_since(began, error.busy):
                    if error.final and len(self._live()) == 1:
                        raise
                    self._leave_out(server, str(error))
                elif not error.busy:  # the server answers others: this request is at fault
                    tried.append(server)
                    if all(candidate in tried for candidate, _ in self._live()):
                        raise
                continue
            server.pause = self._failover.probe
            return answer

    async def _choose_server(self, prompt: Prompt, tried: Sequence[Server]) -> tuple[Server, HTTPEngine]:
        """The prompt's first live server by rendezvous hashing; the least loaded one where that has far more to do."""
        self._probe_some()
        if not self._live():
            await self._revive()
        live = self._live()
        live = [pair for pair in live if pair[0] not in tried] or live
        home = home_of(prompt)
        first = max(live, key=lambda pair: hashlib.blake2b(f"{pair[0].options.url}\0{home}".encode()).digest())
        emptiest = min(live, key=lambda pair: pair[0].pressure)
        crowded = first[0].pressure > max(1.0, CROWDED * emptiest[0].pressure)
        return emptiest if crowded else first

    def _leave_out(self, server: Server, reason: str) -> None:
        if server.out or server.engine is None:
            return
        server.out = reason
        server.probe_at = time.monotonic() + server.pause
        server.engine.shut(f"{server.options.url} is left out: {reason}")
        logger.warning(
            "%s is left out (%s); %d of %d servers go on",
            server.options.url, reason, len(self._live()), len(self._servers),
        )  # fmt: skip

    def _take_back(self, server: Server) -> None:
        server.out = ""
        if server.engine is not None:
            server.engine.reopen()
        logger.warning("%s is back", server.options.url)

    def _probe_some(self) -> None:
        """Probe servers that were excluded for long enough, in the background."""
        for server in self._servers:
            due = server.out and self._failover.returns and time.monotonic() >= server.probe_at
            if due and (server.probing is None or server.probing.done()):
                server.pause = min(2 * server.pause, self._failover.longest_probe)
                server.probing = asyncio.create_task(self._probe(server))

    async def _probe(self, server: Server) -> None:
        """Readmit a server that answers and has the model; otherwise schedule the next probe."""
        try:
            if server.engine is None:
                server.engine = await connect_http_engine(server.options)
            else:
                await server.engine.check()
        except BadInput as error:
            server.out, server.starting = str(error), isinstance(error, NotReady)
            server.probe_at = time.monotonic() + server.pause
        else:
            if server.out:
                self._take_back(server)

    async def _revive(self) -> None:
        """Wait for a server to come back where all are excluded. Raises EngineDead where none does."""
        async with self._reviving:
            began = time.monotonic()
            while self._failover.returns and not self._live():
                await asyncio.gather(*map(self._probe, self._servers))
                starting = any(server.starting for server in self._servers)
                limit = self._patience_s if starting else self._failover.gone
                if self._live() or time.monotonic() - began > limit:
                    break
                await asyncio.sleep(min(1.0, limit / 4))
            if not self._live():
                reasons = "; ".join(f"{server.options.url}: {server.out}" for server in self._servers)
                raise EngineDead(f"none of the servers is left: {reasons}")


def home_of(prompt: Prompt) -> str:
    """Routing key, shared by prompts that share computed work: the image, or the text before the last paragraph."""
    if prompt.image is not None:
        return prompt.image.uid
    beginning, _, _ = prompt.text.rpartition("\n\n")
    return f"{prompt.system}\0{beginning or prompt.text}"


async def connect_servers(
    options: HTTPOptions, urls: Sequence[str], *, all_needed: bool = False, failover: Failover | None = None
) -> Engine:
    """An engine over the servers at ``urls``; ``options`` are for each, except for its URL.

    Raises BadInput where they have different models, and NoAnswer where none of them answers (``all_needed``: or one
    does not). Some may be down: one warning lists them, and they join when they answer.
    """
    if len(urls) == 1:
        return await connect_http_engine(replace(options, url=urls[0]))
    failover = failover or Failover(returns=not all_needed)
    common = replace(
        options, attempts=min(options.attempts, ATTEMPTS), patience_s=min(options.patience_s, failover.patience)
    )
    results = await asyncio.gather(
        *(connect_http_engine(replace(common, url=url)) for url in urls), return_exceptions=True
    )
    engines = {url: engine for url, engine in zip(urls, results, strict=True) if isinstance(engine, HTTPEngine)}
    faults = {url: fault for url, fault in zip(urls, results, strict=True) if isinstance(fault, BaseException)}
    try:
        model = _agreed(engines, faults, all_needed)
    except BaseException:
        for engine in engines.values():
            await engine.aclose()
        raise
    if faults:
        reasons = "; ".join(str(fault) for fault in faults.values())
        logger.warning("%d of %d servers are down and left out: %s", len(faults), len(urls), reasons)
    common = replace(common, model=model)
    servers = [Server(replace(common, url=url), engines.get(url), str(faults.get(url, "")), failover) for url in urls]
    return EngineRouter(servers, options.patience_s, failover)


def _agreed(engines: dict[str, HTTPEngine], faults: dict[str, BaseException], all_needed: bool) -> str:
    """The servers' common model. Raises faults other than a server that is down, or NoAnswer for too many of those."""
    down = [fault for fault in faults.values() if isinstance(fault, NoAnswer)]
    for fault in faults.values():
        if not isinstance(fault, NoAnswer):
            raise fault
    if down and (all_needed or not engines):
        raise none_answers(down)
    return common_model({url: engine.model for url, engine in engines.items()})
