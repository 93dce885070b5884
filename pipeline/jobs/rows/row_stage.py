"""An engine stage of one function per row: its description, and its loaded form."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from ....errors import RunFailed
from ....manifests.shards import Row
from ....manifests.status import Status
from ....models.engines.base import Engine, ImageInput, Refused, RequestError
from ....models.images.formats import ImageProblem
from .engine import EngineSetup, LoadedEngine, SidecarProcessor

#: Returns the columns of one row, from its image and the options. They may include ``status`` and ``error``.
RowFunction = Callable[[Engine, Row, ImageInput, Any], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class RowStage:
    """Everything a worker needs to call ``function`` for each row; picklable, so it must be defined in a module."""

    name: str
    function: RowFunction
    options: BaseModel
    schema: pa.Schema
    setup: EngineSetup

    def semantic(self) -> dict[str, Any]:
        return {**self.setup.semantic(), "options": self.options.model_dump(mode="json")}

    async def load(self) -> RowStageProcessor:
        return RowStageProcessor(self, await self.setup.load())


class RowStageProcessor(SidecarProcessor):
    """The loaded stage. Columns that the function omits are null; a refused or failed request becomes a status."""

    def __init__(self, stage: RowStage, loaded: LoadedEngine) -> None:
        super().__init__(loaded, lambda concurrency: 2 * concurrency + 4 * stage.setup.decode_workers)
        self._stage, self.schema = stage, stage.schema

    async def process_row(self, row: Row) -> dict[str, Any]:
        out = self.passed_on(row)
        image = await self._loaded.image(row)
        if isinstance(image, ImageProblem):
            return {**out, "status": str(image.status), "error": image.reason}
        try:
            columns = await self._stage.function(self._loaded.engine, row, image, self._stage.options)
        except Refused as error:
            return {**out, "status": str(Status.REFUSED), "error": str(error)}
        except RequestError as error:
            return {**out, "status": str(Status.ENGINE_ERROR), "error": str(error)}
        if unknown := columns.keys() - {*self.schema.names}:
            text = f"stage {self._stage.name}: its function returned {min(unknown)!r}, no column of its spec"
            raise RunFailed(f"{text}; add it there, or leave it out")
        return {**out, **columns}

    def passed_on(self, row: Row) -> dict[str, Any]:
        return {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error}
