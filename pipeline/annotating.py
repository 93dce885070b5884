"""`capipe annotate`, put together: a described stage, the same loaded with engine and decoders, and its plan."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, CapipeError
from ..manifests.artifact import Artifact
from ..manifests.schema import ANNOTATE
from ..manifests.shards import InputShard, Row, expand, input_artifact
from ..manifests.sidecars import encode_meta
from ..manifests.status import Status
from ..models.decode import DecodePool
from ..models.engine import ChoiceRequest, ChoiceScores, Completion, Engine, GenerationRequest, ImageGrid, ImageInput
from ..models.formats import ImageProblem
from ..models.http_engine import served_model
from ..models.images import ImageLimits
from ..models.loading import EngineConfig, image_grid, load_engine, model_identity, resolve_model
from ..stages.annotate import AnnotateConfig, Annotator, chosen_caption, passed_on
from .events import Event
from .inline import run_inline
from .runner import LocalRunner, Outcome

#: A server resizes by itself and gets the file; it is decoded here, very small, to find out whether it is sound.
CHECK_GRID = ImageGrid(factor=28, min_pixels=28 * 28, max_pixels=28 * 28)


@dataclass(frozen=True)
class AnnotateStage:
    """Everything a worker needs to caption rows; picklable. ``trace``: a file that gets one line per engine request."""

    config: AnnotateConfig
    engine: EngineConfig
    limits: ImageLimits
    model_name: str
    decode_workers: int
    pack: bool = False
    trace: Path | None = None

    def semantic(self) -> dict[str, Any]:
        """What the fingerprint covers. Greedy or sampled, every engine gives the same captions; so it is not in it."""
        if self.engine.is_http:
            served_model(self.engine.kind)  # raises where no server answers, before anything is written
        identity = model_identity(self.engine.model, self.engine.kind)
        grid = None if self.engine.is_http else self._grid()
        pixels = (
            (self.engine.min_pixels, self.engine.max_pixels) if grid is None else (grid.min_pixels, grid.max_pixels)
        )
        return {
            "model": identity.digest or identity.name,
            "dtype": self.engine.dtype,
            "annotate": self.config.model_dump(mode="json"),
            "pixels": pixels,
            "limits": [self.limits.max_image_pixels, self.limits.min_side, self.limits.max_aspect],
            "pack": self.pack,
        }

    def _grid(self) -> ImageGrid:
        grid = image_grid(resolve_model(self.engine.model), self.engine.min_pixels, self.engine.max_pixels)
        if grid is None:
            raise BadInput(f"{self.engine.model}: reads text only; --model takes a vision-language model")
        return grid

    async def load(self) -> AnnotateProcessor:
        engine = await load_engine(self.engine)
        if self.trace is not None:
            engine = TracedEngine(engine, self.trace)
        pool = DecodePool(self.decode_workers, engine.grid or CHECK_GRID, self.limits)
        return AnnotateProcessor(self, engine, pool)


class AnnotateProcessor:
    """The loaded stage: decode in the pool, caption through the engine."""

    schema = ANNOTATE

    def __init__(self, stage: AnnotateStage, engine: Engine, pool: DecodePool) -> None:
        self.writes_tar = stage.pack
        self.window = 2 * engine.concurrency + 4 * stage.decode_workers
        self._engine, self._pool = _CountingEngine(engine), pool
        self._annotator = Annotator(self._engine, stage.model_name, stage.config)
        self._decoding = 0

    async def process(self, row: Row) -> dict[str, Any]:
        assert row.image is not None and row.uid is not None
        self._decoding += 1
        try:
            pixels = await self._pool.decode(row.image)
        finally:
            self._decoding -= 1
        if isinstance(pixels, ImageProblem):
            return {**passed_on(row), "status": str(pixels.status), "error": pixels.reason}
        if self._engine.grid is None:
            return await self._annotator.annotate(row, ImageInput(row.uid, encoded=row.image))
        return await self._annotator.annotate(row, ImageInput(row.uid, pixels=pixels))

    def passed_on(self, row: Row) -> dict[str, Any]:
        return passed_on(row)

    def members(self, source: Row, row: dict[str, Any]) -> dict[str, bytes] | None:
        """The sample of a packed tar: image bytes as they came, the chosen caption, all captions as JSON."""
        if row["status"] != Status.OK or source.image is None:
            return None
        ours = {name: row[name] for name in ("uid", "text", "captions")}
        return {
            source.format: source.image,
            "txt": chosen_caption(row).encode(),
            "json": encode_meta(source.meta or {}, ours),
        }

    def gauges(self) -> dict[str, int]:
        tokens, self._engine.tokens = self._engine.tokens, 0
        requests, self._engine.requests = self._engine.requests, 0
        return {
            "tokens": tokens,
            "requests": requests,
            "decoding": self._decoding,
            "in_engine": self._engine.busy,
            "concurrency": self._engine.concurrency,
        }

    async def aclose(self) -> None:
        self._pool.close()
        await self._engine.aclose()


class _CountingEngine:
    """An engine with counters for the progress display."""

    def __init__(self, engine: Engine) -> None:
        self._inner = engine
        self.concurrency, self.grid = engine.concurrency, engine.grid
        self.busy = self.tokens = self.requests = 0

    async def generate(self, request: GenerationRequest) -> Completion:
        self.busy += 1
        self.requests += 1
        try:
            completion = await self._inner.generate(request)
        finally:
            self.busy -= 1
        self.tokens += completion.n_tokens
        return completion

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        return await self._inner.choose(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


class TracedEngine(_CountingEngine):
    """Writes a line per request to a file before it goes to the engine: uid, seed, temperature, prompt. For audits."""

    def __init__(self, engine: Engine, path: Path) -> None:
        super().__init__(engine)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    async def generate(self, request: GenerationRequest) -> Completion:
        image, sampling = request.prompt.image, request.sampling
        entry = [image.uid if image else None, sampling.seed, sampling.temperature, request.prompt.text]
        os.write(self._handle, json.dumps(entry).encode() + b"\n")
        return await self._inner.generate(request)

    async def aclose(self) -> None:
        os.close(self._handle)
        await super().aclose()


@dataclass(frozen=True)
class Plan:
    """An annotate run before its first row: the locked output and the shards still to do."""

    stage: AnnotateStage
    artifact: Artifact
    shards: list[InputShard]  # all of the input
    todo: list[InputShard]


def plan(stage: AnnotateStage, pattern: str, out: str, *, fresh: bool = False, retry: bool = False) -> Plan:
    """Check everything that can be checked before a model is loaded, lock the output, and find what is left to do.

    ``retry`` reopens committed shards with unresolved rows. Raises CapipeError; then nothing was written.
    """
    shards = expand(pattern)
    source = input_artifact(pattern)
    semantic = {**stage.semantic(), "input": source.fingerprint if source else None}
    run = {
        "shards": pattern,
        "shards_total": len(shards),
        "model": stage.engine.model,
        "engine": stage.engine.kind,
        "input_manifest": source.manifest_digest() if source else None,
    }
    artifact = Artifact.create(out, "annotate", semantic, run, fresh=fresh)
    try:
        return Plan(stage, artifact, shards, _todo(artifact, shards, retry))
    except CapipeError:
        artifact.close()
        raise


def _todo(artifact: Artifact, shards: list[InputShard], retry: bool) -> list[InputShard]:
    committed = artifact.committed()
    artifact.release_quarantine()
    for shard in shards:
        record = committed.get(shard.name)
        if record is None:
            continue
        shard.check_unchanged(record)
        if retry and record.unresolved:
            artifact.reopen(record, resolved_rows(artifact, record.shard))
            del committed[shard.name]
    return [shard for shard in shards if shard.name not in committed]


def resolved_rows(artifact: Artifact, shard: str) -> dict[int, dict[str, Any]]:
    """The rows of a committed shard whose fate is final, by index."""
    rows = artifact.read_rows(shard)
    return {index: row for index, row in enumerate(rows) if Status(row["status"]).resolved}


def execute(made: Plan, report: Callable[[Event], None], gpus: Sequence[str]) -> Outcome:
    """Caption the plan's shards; returns when all are committed or quarantined, or on Ctrl-C."""
    if made.artifact.folder.is_shared and all(shard.is_shared for shard in made.todo):
        return LocalRunner(made.stage, made.artifact, report, gpus).run(made.todo)
    return run_inline(made.stage, made.artifact, report, made.todo)
