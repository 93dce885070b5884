"""Several servers of one model as one engine: what belongs to an image always goes to the same one, for its cache."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from pathlib import Path

from .engine import ChoiceRequest, ChoiceScores, Completion, GenerationRequest, Prompt
from .http_engine import HTTPEngine


class Several:
    """Implements :class:`~.engine.Engine` over ``engines``, at least one."""

    def __init__(self, engines: Sequence[HTTPEngine]) -> None:
        self._engines = list(engines)
        self.concurrency = sum(each.concurrency for each in engines)
        self.grid = engines[0].grid
        self.guides = all(each.guides for each in engines)
        self.context = min((each.context for each in engines if each.context is not None), default=None)

    async def generate(self, request: GenerationRequest) -> Completion:
        return await self._of(request.prompt).generate(request)

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        return await self._of(request.prompt).choose(request)

    async def count_tokens(self, prompt: Prompt) -> int | None:
        return await self._engines[0].count_tokens(prompt)

    async def reload(self, folder: Path) -> None:
        """New weights for all, at once. Raises EngineDead."""
        await asyncio.gather(*(each.reload(folder) for each in self._engines))

    async def aclose(self) -> None:
        for each in self._engines:
            await each.aclose()

    def _of(self, prompt: Prompt) -> HTTPEngine:
        return self._engines[zlib.crc32("\0".join(map(str, prompt.key)).encode()) % len(self._engines)]
