"""Stages that check captions sentence by sentence, for `capipe filter` and `capipe eval`: described and loaded."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from ....manifests.schema import CHECKED, SENTENCES
from ....manifests.shards import Row
from ....models.engines.base import ImageInput
from ....models.engines.context import quiz_room
from ....models.images.formats import ImageProblem
from ....models.reader import ReaderConfig
from ....models.yes_no import CHECK, YesNoConfig, YesNoReader
from ....stages.filter import sentences
from ....stages.questions import check
from ....stages.questions.check import CaptionChecker, CheckConfig
from .engine import EngineSetup, LoadedEngine, SidecarProcessor

REQUESTS_PER_ROW = 20  # ten sentences in both orders
AHEAD = 2  # rows in progress beyond those that fill the engine and the decoders


def sentence_room(config: YesNoConfig) -> int:
    """Context tokens for a sentence and the answer about it, without the image."""
    return quiz_room(0, config.answer_tokens)


async def _loaded(setup: EngineSetup, config: YesNoConfig) -> LoadedEngine:
    """The engine. Raises BadInput for a server that cannot be asked so."""
    return await (await setup.load()).check(ReaderConfig(mode=config.mode, thought_tokens=config.thought_tokens))


class _SentenceProcessor(SidecarProcessor):
    """Common parts of both loaded stages. Images of rows without a caption are not decoded.

    An engine that batches what waits together gets the sentences of one image at a time, as in `capipe ask`: a run that
    was killed and resumed then writes the same bytes.
    """

    def __init__(self, setup: EngineSetup, loaded: LoadedEngine, config: YesNoConfig) -> None:
        ahead = AHEAD + 4 * setup.decode_workers
        requests = REQUESTS_PER_ROW * (config.samples if config.mode == "sampled" else 1)
        super().__init__(loaded, lambda concurrency: ahead + 2 * concurrency // requests)
        self.reader = YesNoReader(loaded.engine, config)
        alone = loaded.engine.batches and config.mode == "choose"
        self._turn: AbstractAsyncContextManager[object] = asyncio.Lock() if alone else nullcontext()

    async def process_row(self, row: Row) -> dict[str, Any]:
        if (unchecked := self.unchecked(row)) is not None:
            return unchecked
        image = await self._loaded.image(row)
        if isinstance(image, ImageProblem):
            return {**self.passed_on(row), "status": str(image.status), "error": image.reason}
        async with self._turn:
            return await self.checked(row, image)

    def unchecked(self, row: Row) -> dict[str, Any] | None:
        """The output row of one with nothing to check; None for others."""
        raise NotImplementedError

    async def checked(self, row: Row, image: ImageInput) -> dict[str, Any]:
        raise NotImplementedError

    def passed_on(self, row: Row) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class SentenceStage:
    """Everything a worker needs to check the captions that `capipe filter` scores; picklable."""

    config: YesNoConfig
    setup: EngineSetup
    name: str = "sentences"

    def semantic(self) -> dict[str, Any]:
        return {**self.setup.semantic(), "question": CHECK, "check": self.config.model_dump(mode="json")}

    async def load(self) -> SentenceProcessor:
        return SentenceProcessor(self.setup, await _loaded(self.setup, self.config), self.config)


class SentenceProcessor(_SentenceProcessor):
    """The loaded stage."""

    schema = SENTENCES

    def unchecked(self, row: Row) -> dict[str, Any] | None:
        return sentences.unchecked(row)

    async def checked(self, row: Row, image: ImageInput) -> dict[str, Any]:
        return await sentences.check_row(self.reader, row, image)

    def passed_on(self, row: Row) -> dict[str, Any]:
        return sentences.passed_on(row)


@dataclass(frozen=True)
class CheckStage:
    """Everything a worker needs to check the captions of an evaluation; picklable."""

    config: CheckConfig
    setup: EngineSetup
    name: str = "checked"

    def semantic(self) -> dict[str, Any]:
        return {**self.setup.semantic(), "check": self.config.semantic()}

    async def load(self) -> CheckProcessor:
        return CheckProcessor(self, await _loaded(self.setup, self.config.reader))


class CheckProcessor(_SentenceProcessor):
    """The loaded stage."""

    schema = CHECKED

    def __init__(self, stage: CheckStage, loaded: LoadedEngine) -> None:
        super().__init__(stage.setup, loaded, stage.config.reader)
        self._checker = CaptionChecker(self.reader, stage.config)

    def unchecked(self, row: Row) -> dict[str, Any] | None:
        return None if check.subjects_of(row, self._checker.config.controls) else check.passed_on(row)

    async def checked(self, row: Row, image: ImageInput) -> dict[str, Any]:
        return await self._checker.check(row, image)

    def passed_on(self, row: Row) -> dict[str, Any]:
        return check.passed_on(row)
