"""`capipe annotate`: the stage's description, and its loaded form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...manifests.schema import ANNOTATE
from ...manifests.shards import Row
from ...manifests.sidecars import encode_meta
from ...manifests.status import Status
from ...models.images.formats import ImageProblem
from ...stages.annotate.captioner import AnnotateConfig, Annotator, chosen_caption, passed_on
from .rows.engine import EngineRows, EngineSetup, LoadedEngine
from .rows.prompts import check_prompts


@dataclass(frozen=True)
class AnnotateStage:
    """Everything a worker needs to caption rows; picklable."""

    config: AnnotateConfig
    setup: EngineSetup
    model_name: str
    pack: bool = False
    name: str = "annotate"

    def semantic(self) -> dict[str, Any]:
        return {**self.setup.semantic(), "annotate": self.config.model_dump(mode="json"), "pack": self.pack}

    async def load(self) -> AnnotateProcessor:
        loaded = await (await self.setup.load()).check_sampling(self.config.sampling)
        try:
            await check_prompts(loaded.engine, self.config)
        except BaseException:
            await loaded.aclose()
            raise
        return AnnotateProcessor(self, loaded)


class AnnotateProcessor(EngineRows):
    """The loaded stage: decodes in the pool, captions with the engine."""

    schema = ANNOTATE

    def __init__(self, stage: AnnotateStage, loaded: LoadedEngine) -> None:
        self.writes_tar = stage.pack
        self._loaded, self._decode_workers = loaded, stage.setup.decode_workers
        self._annotator = Annotator(loaded.engine, stage.model_name, stage.config)

    @property
    def window(self) -> int:
        return 2 * self._loaded.engine.concurrency + 4 * self._decode_workers

    async def process_row(self, row: Row) -> dict[str, Any]:
        image = await self._loaded.image(row)
        if isinstance(image, ImageProblem):
            return {**passed_on(row), "status": str(image.status), "error": image.reason}
        return await self._annotator.annotate(row, image)

    def passed_on(self, row: Row) -> dict[str, Any]:
        return passed_on(row)

    def members(self, source: Row, row: dict[str, Any]) -> dict[str, bytes] | None:
        """The sample of a packed tar: original image bytes, the chosen caption, all captions as JSON."""
        if row["status"] != Status.OK or source.image is None:
            return None
        ours = {name: row[name] for name in ("uid", "text", "captions")}
        return {
            source.format: source.image,
            "txt": chosen_caption(row).encode(),
            "json": encode_meta(source.meta or {}, ours),
        }

    def gauges(self) -> dict[str, int]:
        return self._loaded.gauges()

    async def aclose(self) -> None:
        await self._loaded.aclose()
