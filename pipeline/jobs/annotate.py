"""`capipe annotate`: the stage's description, and its loaded form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from ...manifests.import_path import is_import_path
from ...manifests.schema import ANNOTATE
from ...manifests.shards import Row
from ...manifests.sidecars import encode_meta
from ...manifests.status import Status
from ...models.engines.base import Engine, ImageInput, Prompt, RequestError
from ...models.engines.captioner_registry import check_prompt, kind_of
from ...models.engines.context import too_long
from ...models.engines.model_folder import resolve_model
from ...models.images.formats import ImageProblem
from ...stages.annotate.captioner import AnnotateConfig, Annotator, chosen_caption, passed_on
from ...stages.annotate.prompts import NamedPrompt, parse_prompt
from .rows.engine import EngineRows, EngineSetup, LoadedEngine


def chosen_prompts(
    options: Sequence[str] | None, model: str | None, engine: str, system: str | None = None
) -> tuple[NamedPrompt, ...]:
    """Prompts of ``--prompt``; by default the plain one, or none for captioners that are not chat models.

    Raises BadInput for a prompt that the model does not support; prompts for a server's model are not checked here.
    """
    if model is None or "://" in engine or is_import_path(engine):
        return parse_prompts(options)
    path = resolve_model(model)
    prompts = parse_prompts(options, "plain" if kind_of(path) is None else "none")
    for prompt in prompts:
        check_prompt(model, path, prompt.text, system)
    return prompts


def parse_prompts(options: Sequence[str] | None, default: str = "plain") -> tuple[NamedPrompt, ...]:
    """Prompts of ``--prompt``, for any model. Raises BadInput."""
    return tuple(parse_prompt(option) for option in options or [default])


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


async def check_prompts(engine: Engine, config: AnnotateConfig) -> None:
    """Raise BadInput for a prompt that can work with no image: once, before the first image.

    A server refuses such a prompt request by request; the run then ends after a number of them
    (:mod:`..runners.circuit_breaker`).
    """
    for prompt in config.prompts:
        try:
            tokens = await engine.count_tokens(Prompt(prompt.text, ImageInput("probe"), config.system))
        except RequestError as error:
            raise BadInput(f"--prompt {prompt.name}: {error}") from error
        if tokens is not None and engine.context is not None and tokens >= engine.context:
            raise BadInput(f"--prompt {prompt.name}: {too_long(tokens, engine.context)}, or a shorter prompt")


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
