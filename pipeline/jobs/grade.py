"""The grading stage of `capipe eval`: description, checks against its reader, and loaded form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ...manifests.schema import GRADE, GRADE_WITH_OPEN
from ...manifests.shards import Row
from ...models.context_check import check_asked, room
from ...models.engines.base import Engine
from ...models.engines.context import quiz_room
from ...models.engines.loading import EngineConfig, ModelIdentity, model_identity
from ...models.quiz import PromptStyle, Question
from ...models.reader import QuizReader, ReaderConfig
from ...stages.questions import grade
from ...stages.questions.grade import GradeConfig, Grader
from ...stages.questions.open_ended import OpenQuestion, OpenReader, OpenReaderConfig
from .rows.engine import REQUESTS_PER_ROW, EngineSetup, LoadedEngine, SidecarProcessor
from .rows.reader_checks import too_long

ROWS = 4  # rows in progress beyond those that fill the engine


@dataclass(frozen=True)
class GradeStage:
    """Everything a worker needs to grade captions; picklable.

    ``asked`` and ``opened``: questions sufficient to check that the reader can answer all, by a letter and in words;
    ``longest``: the most tokens of a caption to be read with them.
    """

    config: GradeConfig
    setup: EngineSetup
    mode: Literal["choose", "sampled"] = "choose"
    asked: tuple[Question, ...] = ()
    longest: int = 0
    prompt: PromptStyle = "own"
    open_ended: bool = False  # the questions have open-ended ones, to be answered in words
    opened: tuple[OpenQuestion, ...] = ()
    name: str = "grade"

    def semantic(self) -> dict[str, Any]:
        return {
            **self.setup.semantic(),
            "grade": self.config.model_dump(mode="json"),
            "reader": self.reader.model_dump(),
            **({"open_ended": OpenReaderConfig().model_dump()} if self.open_ended else {}),
        }

    @property
    def reader(self) -> ReaderConfig:
        return ReaderConfig(presentations=self.config.presentations, mode=self.mode, prompt=self.prompt)

    @property
    def answer_tokens(self) -> int:
        """Tokens of the longest answer with the thought before it."""
        return answer_tokens(self.reader, self.open_ended)

    @property
    def engine(self) -> EngineConfig:
        return self.setup.engine

    @property
    def identity(self) -> ModelIdentity:
        """Identity of the reader model. Raises BadInput if the model or its server does not exist."""
        return model_identity(self.engine.model, self.engine.kind)

    async def load(self) -> GradeProcessor:
        loaded = await (await self.setup.load()).check(self.reader)
        try:
            await self._check(loaded.engine)
        except BaseException:
            await loaded.aclose()
            raise
        return GradeProcessor(self, loaded)

    def with_room(self, longest: int) -> GradeStage:
        """The stage for captions of up to ``longest`` tokens of the reader, or its previous room if that is larger."""
        engine = self.setup.engine
        if engine.room is not None:
            engine = replace(engine, room=max(engine.room, quiz_room(longest, self.answer_tokens)))
        return replace(self, setup=replace(self.setup, engine=engine), longest=longest)

    async def _check(self, engine: Engine) -> None:
        """Checks that need the running engine. Raises BadInput."""
        reader, name = QuizReader(engine, self.reader), self.engine.model or self.engine.kind
        left = await room(reader, self.asked) if self.asked else None
        in_words = await OpenReader(engine).room(self.opened) if self.opened else None
        for each in (left, in_words):
            if each is not None and each < self.longest:
                raise too_long(name, engine.context, self.longest, each)
        # A server reports unsupported requests one by one, and they may be temporary.
        if self.asked and not self.engine.is_http:
            await check_asked(reader, name, self.asked)


def answer_tokens(reader: ReaderConfig, open_ended: bool) -> int:
    """Tokens of the longest answer of a reader, also in words if ``open_ended``, with the thought before it."""
    return max(reader.answer_tokens, OpenReaderConfig().answer_tokens if open_ended else 0)


class GradeProcessor(SidecarProcessor):
    """The loaded stage; it uses no images."""

    schema = GRADE

    def __init__(self, stage: GradeStage, loaded: LoadedEngine) -> None:
        super().__init__(loaded, lambda concurrency: ROWS + 2 * concurrency // REQUESTS_PER_ROW)
        self.schema = GRADE_WITH_OPEN if stage.open_ended else GRADE
        open_reader = OpenReader(loaded.engine) if stage.open_ended else None
        self._grader = Grader(QuizReader(loaded.engine, stage.reader), stage.config, open_reader)

    async def process_row(self, row: Row) -> dict[str, Any]:
        return await self._grader.grade(row)

    def passed_on(self, row: Row) -> dict[str, Any]:
        return grade.passed_on(row)
