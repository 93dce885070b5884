"""Common parts of stages that use an engine: loading engine and decoders, counting, planning and running."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ....errors import BadInput, CapipeError
from ....manifests.artifact import Artifact
from ....manifests.manifest import ShardRecord
from ....manifests.shards import OPEN, InputShard, Row, expand, input_artifact, join, read_places
from ....manifests.status import Status
from ....models.engines.base import (
    Engine,
    ImageInput,
    Sampling,
    unsupported,
)
from ....models.engines.chat_templates import check_template
from ....models.engines.http.server import served_model
from ....models.engines.loading import EngineConfig, load_engine, model_identity
from ....models.engines.lora import check_adapter
from ....models.engines.model_folder import folder_digest, image_grid, resolve_model
from ....models.engines.vllm.arguments import changing_rows
from ....models.images.decode import ImageLimits, Pixels
from ....models.images.decode_pool import DecodePool, check_for_server, grid_decoder
from ....models.images.formats import ImageProblem
from ....models.images.grid import ImageGrid
from ....models.reader import QuizReader, ReaderConfig
from ....stages.filter.marked import unaffected
from ...runners.inline import run_inline
from ...runners.messages import Event
from ...runners.placement import Placement
from ...runners.shard_queue import JobResult
from ...runners.worker import RowByRow, Stage
from .counting_engine import CountingEngine, TracedEngine
from .image_formats import accepting
from .usage import counted

REQUESTS_PER_ROW = 25  # for a row with a quiz: five questions in five orders


@dataclass(frozen=True)
class EngineSetup:
    """The engine of a stage, and how it gets images; picklable. ``decode_workers`` 0: it reads text only."""

    engine: EngineConfig
    limits: ImageLimits = field(default_factory=ImageLimits)
    decode_workers: int = 0
    trace: Path | None = None  # log file with one line per request

    def semantic(self) -> dict[str, Any]:
        """Settings covered by fingerprints. The engine is not one: all give the same answers, greedy or sampled."""
        if self.engine.is_http:
            served_model(self.engine.kind, self.engine.model)  # raises if no server answers, before anything is written
        elif not self.engine.is_own:  # an unusable model is refused here, before anything is written
            path = resolve_model(self.engine.model)
            sees = image_grid(path, self.engine.min_pixels, self.engine.max_pixels) is not None
            check_template(path, sees, self.engine.template_args)
        identity = model_identity(self.engine.model, self.engine.kind)
        facts: dict[str, Any] = {"model": identity.digest or identity.name, "dtype": self.engine.dtype}
        facts |= self._more()
        if not self.decode_workers:
            return facts
        grid = None if self.engine.is_http or self.engine.is_own else self._grid()
        asked = (self.engine.min_pixels, self.engine.max_pixels)
        limits = [self.limits.max_image_pixels, self.limits.min_side, self.limits.max_aspect]
        return {**facts, "pixels": asked if grid is None else (grid.min_pixels, grid.max_pixels), "limits": limits}

    def _more(self) -> dict[str, Any]:
        """Settings that most runs do not use: if they are not set, fingerprints stay as before they existed."""
        engine = self.engine
        more: dict[str, Any] = {"template_args": dict(engine.template_args)}
        more["engine_args"] = changing_rows(engine.engine_args)
        more["engine"] = engine.kind if engine.is_own else ""
        if engine.adapter:
            more["adapter"] = folder_digest(check_adapter(engine.adapter))
        return {name: value for name, value in more.items() if value}

    def _grid(self) -> ImageGrid:
        grid = image_grid(resolve_model(self.engine.model), self.engine.min_pixels, self.engine.max_pixels)
        if grid is None:
            raise BadInput(f"{self.engine.model}: reads text only; name a vision-language model")
        return grid

    def provenance(self) -> dict[str, Any]:
        adapter = {"adapter": self.engine.adapter} if self.engine.adapter else {}
        return {"model": self.engine.model, "engine": self.engine.kind, **adapter}

    async def load(self) -> LoadedEngine:
        engine = await load_engine(self.engine)
        if self.trace is not None:
            engine = TracedEngine(engine, self.trace)
        pool: DecodePool[Pixels] | DecodePool[bytes] | None = None
        if self.decode_workers and engine.grid is not None:
            pool = DecodePool(self.decode_workers, grid_decoder(engine.grid, self.limits))
        elif self.decode_workers:  # a server resizes images itself
            pool = DecodePool(self.decode_workers, functools.partial(check_for_server, limits=self.limits))
        return LoadedEngine(engine, pool, self.engine.is_http)


class LoadedEngine:
    """An engine that counts its requests, with the image decoders in front of it."""

    def __init__(
        self, engine: Engine, pool: DecodePool[Pixels] | DecodePool[bytes] | None, served: bool = False
    ) -> None:
        self.engine = CountingEngine(engine)
        self._pool, self._decoding, self._served = pool, 0, served

    async def check(self, config: ReaderConfig) -> LoadedEngine:
        """Check that a server can be used as a reader; if not, closes the engine and raises BadInput.

        The capabilities of built-in engines are known without requests.
        """
        try:
            if self._served:
                await QuizReader(self.engine, config).check()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def check_sampling(self, sampling: Sampling) -> LoadedEngine:
        """Check that the engine can sample so; if not, closes it and raises BadInput."""
        if (why := unsupported(self.engine, sampling)) is not None:
            await self.aclose()
            raise BadInput(why)
        return self

    async def image(self, row: Row) -> ImageInput | ImageProblem:
        """A row's image in the form that its engine expects, or its problem."""
        assert row.image is not None and row.uid is not None and self._pool is not None
        self._decoding += 1
        try:
            decoded = await self._pool.decode(row.image)
        finally:
            self._decoding -= 1
        if isinstance(decoded, ImageProblem):
            return decoded
        if isinstance(decoded, bytes):
            return ImageInput(row.uid, encoded=decoded or row.image)
        return ImageInput(row.uid, pixels=decoded)

    def gauges(self) -> dict[str, int]:
        tokens, self.engine.tokens = self.engine.tokens, 0
        requests, self.engine.requests = self.engine.requests, 0
        return {
            "tokens": tokens,
            "requests": requests,
            "decoding": self._decoding,
            "in_engine": self.engine.busy,
            "concurrency": self.engine.concurrency,
        }

    async def aclose(self) -> None:
        if self._pool is not None:
            self._pool.close()
        await self.engine.aclose()


class EngineRows(RowByRow):
    """Rows that cost tokens, with columns of how many."""

    async def process(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [await counted(self.process_row, row) for row in rows]


class SidecarProcessor(EngineRows):
    """Common parts of processors that write no tars: their engine, and the number of rows in progress.

    ``rows``: their number for an engine of a given concurrency, which changes while a server's capacity is explored.
    """

    writes_tar = False

    def __init__(self, loaded: LoadedEngine, rows: Callable[[int], int]) -> None:
        self._loaded, self._rows = loaded, rows

    @property
    def window(self) -> int:
        return self._rows(self._loaded.engine.concurrency)

    def members(self, source: Row, row: dict[str, Any]) -> dict[str, bytes] | None:
        return None

    def gauges(self) -> dict[str, int]:
        return self._loaded.gauges()

    async def aclose(self) -> None:
        await self._loaded.aclose()


class Setup(Protocol):
    """The models of a stage. ``provenance``: facts about them that an artifact records beside its fingerprint."""

    def provenance(self) -> dict[str, Any]: ...


class EngineStage(Stage, Protocol):
    """A stage as described by a command. ``name``: its artifact's stage; ``setup`` None: it needs no model."""

    @property
    def name(self) -> str: ...

    @property
    def setup(self) -> Setup | None: ...

    def semantic(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class StagePlan:
    """A run before its first row: the locked output and the shards left to do."""

    stage: EngineStage
    artifact: Artifact
    shards: list[InputShard]  # all of the input
    todo: list[InputShard]


def plan(
    stage: EngineStage,
    pattern: str,
    out: str,
    *,
    beside: Mapping[str, Artifact] | None = None,
    fresh: bool = False,
    retry: bool = False,
    share: bool = False,
    also_read: Sequence[str] = (),
) -> StagePlan:
    """Check everything that can be checked before loading a model, lock the output, and find the shards left to do.

    Shards with input rows that were redone since are retracted; rows of unchanged images keep their results.
    ``beside``: artifacts whose rows are joined with each row, by name. ``retry`` reopens committed shards with
    unresolved rows; ``share`` lets other processes work on the same output; ``also_read`` names input files that are
    neither shards nor artifacts. Raises CapipeError; then nothing was written.
    """
    if share and (fresh or retry):
        word = "--fresh" if fresh else "--retry"
        raise BadInput(f"{word}: takes committed shards back, which others may be adding to; run it without --share")
    beside = beside or {}
    source = input_artifact(pattern)
    shards = join(expand(pattern, source), beside)
    stage = accepting(stage, shards)
    semantic = {**stage.semantic(), "input": source.fingerprint if source else None}
    semantic |= {name: artifact.fingerprint for name, artifact in beside.items()}
    run = {
        "shards": pattern,
        "shards_total": len(shards),
        **(stage.setup.provenance() if stage.setup else {}),
        "input_manifest": source.manifest_digest() if source else None,
        **{name: artifact.url for name, artifact in beside.items()},
    }
    reads = [*read_places(pattern, shards, beside.values()), *also_read]
    artifact = Artifact.create(out, stage.name, semantic, run, fresh=fresh, share=share, reads=reads)
    try:
        return StagePlan(stage, artifact, shards, _todo(artifact, shards, retry))
    except CapipeError:
        artifact.close()
        raise


def _todo(artifact: Artifact, shards: list[InputShard], retry: bool) -> list[InputShard]:
    committed = artifact.committed()
    if not artifact.shared:
        artifact.release_quarantine()
    for shard in shards:
        record = committed.get(shard.name)
        if record is None:
            continue
        repaired, again = shard.is_repaired(record), retry and record.unresolved > 0
        if not again:  # with retry, sidecars may have changed in any way: unresolved rows may be resolved
            repaired |= shard.has_repaired_companions(record)
        if repaired and artifact.shared:
            text = f"{shard.url}: some of its rows were done again since; run the command once without --share"
            raise BadInput(f"{text}, which takes the shards made of it back")
        if again or repaired or (not artifact.shared and _read_in_vain(artifact, record, shard)):
            open_rows = set(record.input.get(OPEN, ()))
            kept = resolved_rows(artifact, record.shard)
            if record.input.get("companions", {}) != {each.name: each.sha256 for each in shard.companions}:
                kept = unaffected(kept, [companion.statuses() for companion in shard.companions])
            artifact.reopen(record, {index: row for index, row in kept.items() if index not in open_rows})
            del committed[shard.name]
    return [shard for shard in shards if shard.name not in committed]


def _read_in_vain(artifact: Artifact, record: ShardRecord, shard: InputShard) -> bool:
    """True if a row is a ``read_error`` of this stage itself, not one passed on from its input."""
    if not record.rows.get(Status.READ_ERROR):
        return False
    own = [row["status"] for row in artifact.read_rows(record.shard)]
    inputs = [] if shard.record is None else [shard.statuses()]
    inputs += [companion.statuses() for companion in shard.companions]
    return any(
        status == Status.READ_ERROR and Status.READ_ERROR not in before
        for status, *before in zip(own, *inputs, strict=True)
    )


def resolved_rows(artifact: Artifact, shard: str) -> dict[int, dict[str, Any]]:
    """Rows of a committed shard with a final status, by index."""
    rows = artifact.read_rows(shard)
    return {index: row for index, row in enumerate(rows) if Status(row["status"]).resolved}


def execute(made: StagePlan, report: Callable[[Event], None], workplace: Placement) -> JobResult:
    """Run the plan's shards; returns when all are committed or quarantined, or on Ctrl-C."""
    if made.stage.setup is None:
        return run_inline(made.stage, made.artifact, report, made.todo)
    return workplace.run(made.stage, made.artifact, report, made.todo)
