"""`capipe ask`: the stage's description, and its loaded form."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from ...manifests.shards import Row
from ...models.engines.base import Engine, RequestError
from ...models.engines.context import too_long
from ...models.images.formats import ImageProblem
from ...models.reader import ReaderConfig
from ...models.yes_no import YesNoReader
from ...stages.ask.asker import AskConfig, Asker, passed_on
from .rows.engine import EngineSetup, LoadedEngine, SidecarProcessor

AHEAD = 2  # rows in progress beyond those that fill the engine and the decoders


@dataclass(frozen=True)
class AskStage:
    """Everything a worker needs to ask about rows; picklable."""

    config: AskConfig
    setup: EngineSetup
    name: str = "ask"

    def semantic(self) -> dict[str, Any]:
        return {**self.setup.semantic(), "ask": self.config.semantic()}

    async def load(self) -> AskProcessor:
        """Raises BadInput for a server that can answer none of the questions, and for one without room in the
        context."""
        reader = self.config.reader
        shared = reader.model_dump(include={"mode", "temperature", "max_tokens", "thought_tokens", "seed"})
        loaded = await (await self.setup.load()).check(ReaderConfig(**shared))
        try:
            await check_questions(loaded.engine, self.config)
        except BaseException:
            await loaded.aclose()
            raise
        return AskProcessor(self, loaded)


async def check_questions(engine: Engine, config: AskConfig) -> None:
    """Raise BadInput for a question that can be asked about no image: once, before the first one."""
    for name, prompt in config.prompts.items():
        try:
            tokens = await engine.count_tokens(prompt)
        except RequestError as error:
            raise BadInput(f"--ask {name}: {error}") from error
        if tokens is not None and engine.context is not None and tokens >= engine.context:
            raise BadInput(f"--ask {name}: {too_long(tokens, engine.context)}, or ask in fewer words")


class AskProcessor(SidecarProcessor):
    """The loaded stage.

    An engine that batches what waits together gets the questions of one image at a time: its probabilities, to the last
    digit, then depend on the row alone, and a run that was killed and resumed writes the same bytes.
    """

    def __init__(self, stage: AskStage, loaded: LoadedEngine) -> None:
        ahead, requests = AHEAD + 4 * stage.setup.decode_workers, stage.config.requests
        super().__init__(loaded, lambda concurrency: ahead + 2 * concurrency // requests)
        self.schema = stage.config.schema
        self._asker = Asker(YesNoReader(loaded.engine, stage.config.reader), stage.config)
        alone = loaded.engine.batches and stage.config.reader.mode == "choose"
        self._turn: AbstractAsyncContextManager[object] = asyncio.Lock() if alone else nullcontext()

    async def process_row(self, row: Row) -> dict[str, Any]:
        image = await self._loaded.image(row)
        if isinstance(image, ImageProblem):
            return {**passed_on(row), "status": str(image.status), "error": image.reason}
        async with self._turn:
            return await self._asker.ask(row, image)

    def passed_on(self, row: Row) -> dict[str, Any]:
        return passed_on(row)
