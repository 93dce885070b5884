"""The grading stage of `capipe eval`, described and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..manifests.schema import GRADE
from ..manifests.shards import Row
from ..models.reader import QuizReader, ReaderConfig
from ..stages import grade
from ..stages.grade import GradeConfig, Grader
from .engine_stages import REQUESTS_PER_ROW, EngineSetup, LoadedEngine, SidecarProcessor

ROWS = 4  # rows a reader works on beyond those that fill its engine


@dataclass(frozen=True)
class GradeStage:
    """Everything a worker needs to grade captions; picklable."""

    config: GradeConfig
    setup: EngineSetup
    mode: Literal["choose", "sampled"] = "choose"
    name: str = "grade"

    def semantic(self) -> dict[str, Any]:
        return {
            **self.setup.semantic(),
            "grade": self.config.model_dump(mode="json"),
            "reader": self.reader.model_dump(),
        }

    @property
    def reader(self) -> ReaderConfig:
        return ReaderConfig(presentations=self.config.presentations, mode=self.mode)

    async def load(self) -> GradeProcessor:
        loaded = await self.setup.load()
        return GradeProcessor(self, await loaded.check(self.reader))


class GradeProcessor(SidecarProcessor):
    """The loaded stage; it needs no image."""

    schema = GRADE

    def __init__(self, stage: GradeStage, loaded: LoadedEngine) -> None:
        super().__init__(loaded, lambda concurrency: ROWS + 2 * concurrency // REQUESTS_PER_ROW)
        self._grader = Grader(QuizReader(loaded.engine, stage.reader), stage.config)

    async def process_row(self, row: Row) -> dict[str, Any]:
        return await self._grader.grade(row)

    def passed_on(self, row: Row) -> dict[str, Any]:
        return grade.passed_on(row)
