"""Engines of stages as seen by their rows: with counters, and with a log of requests."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from ....models.engines.base import (
    ChoiceRequest,
    ChoiceScores,
    Completion,
    Engine,
    GenerationRequest,
    Prompt,
    Refused,
    RequestError,
    Sampling,
    batches,
    unsupported,
)
from ....models.engines.router import home_of
from ....models.engines.thinking import thinks
from ...runners.circuit_breaker import Refusals, answered
from .usage import add

Got = TypeVar("Got")


class CountingEngine:
    """An engine with counters for the progress display and the circuit breaker.

    Also raises RunFailed: if the engine permanently refuses one request after another.
    """

    def __init__(self, engine: Engine) -> None:
        self._inner = engine
        self.grid, self.guides, self.context = engine.grid, engine.guides, engine.context
        self.batches = batches(engine)
        self.busy = self.tokens = self.requests = 0
        self._refusals = Refusals()

    @property
    def concurrency(self) -> int:
        return self._inner.concurrency

    async def generate(self, request: GenerationRequest) -> Completion:
        completion = await self._counted(self._inner.generate(request), request.prompt)
        self.tokens += completion.n_tokens or 0
        add(request.prompt, completion)
        return completion

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        scores = await self._counted(self._inner.choose(request), request.prompt)
        add(request.prompt, scores)
        return scores

    async def _counted(self, asked: Awaitable[Got], prompt: Prompt) -> Got:
        self.busy += 1
        self.requests += 1
        try:
            got = await asked
        except Refused:  # also an answer, if not the desired one
            self._answered()
            raise
        except RequestError as error:
            self._refusals.failed(error, home_of(prompt))
            raise
        finally:
            self.busy -= 1
        self._answered()
        return got

    def _answered(self) -> None:
        self._refusals.over()
        answered()

    def unsupported(self, sampling: Sampling) -> str | None:
        return unsupported(self._inner, sampling)

    async def thinks(self) -> bool:
        return await thinks(self._inner)

    async def count_tokens(self, prompt: Prompt) -> int | None:
        return await self._inner.count_tokens(prompt)

    async def aclose(self) -> None:
        await self._inner.aclose()


class TracedEngine(CountingEngine):
    """Logs each generation to a file before sending it to the engine: uid, seed, temperature, prompt.

    Counts nothing: the engine around it does.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        super().__init__(engine)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    async def generate(self, request: GenerationRequest) -> Completion:
        image, sampling = request.prompt.image, request.sampling
        entry = [image.uid if image else None, sampling.seed, sampling.temperature, request.prompt.text]
        os.write(self._handle, json.dumps(entry).encode() + b"\n")
        return await self._inner.generate(request)

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        return await self._inner.choose(request)

    async def aclose(self) -> None:
        os.close(self._handle)
        await super().aclose()
