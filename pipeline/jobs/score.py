"""The stages of `capipe filter` (scoring) and `capipe embed`: descriptions and loaded forms."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy.typing as npt
import pyarrow as pa
import torch

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.fingerprint import differences
from ...manifests.schema import EMBEDDING_COLUMN, SCORE, embedding, embedding_width
from ...manifests.shards import Row
from ...manifests.status import Status
from ...models.halving import OF_DEVICES, by_halves
from ...models.images.decode import ImageLimits
from ...models.images.decode_pool import DecodePool
from ...models.images.formats import ImageProblem
from ...models.images.preprocess import Preprocess, decode_preprocessed
from ...models.scorers.base import Scorer, computing_threads, device_and_type
from ...models.scorers.clip import load_clip
from ...models.scorers.loading import ScorerConfig, load_scorer, scorer_identity
from ...models.scorers.stored import StoredClip
from ...stages.filter.score import (
    CHUNK,
    EMBEDDINGS,
    CaptionScorer,
    PreparedRows,
    SafetyDetector,
    SeenRow,
    captions_of,
    passed_on,
    safety_columns,
    unscored,
)
from ..runners.circuit_breaker import answered

Views = tuple[npt.NDArray[Any], ...]  # pixels, or a stored vector


@dataclass(frozen=True)
class StoredImages:
    """Embeddings in place of a CLIP's vision encoder. ``safety``: they have the safety detector's columns, too."""

    width: int
    safety: bool


@dataclass(frozen=True)
class ScoreSetup:
    """The scorer models, and how they get images; picklable. ``stored``: what they take from embeddings instead."""

    scorers: tuple[ScorerConfig, ...]
    decode_workers: int
    safety: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    stored: StoredImages | None = None

    def provenance(self) -> dict[str, Any]:
        return {"models": {scorer.kind: scorer.model for scorer in self.scorers}}

    def semantic(self) -> dict[str, Any]:
        return {
            "scorers": {scorer.kind: scorer_identity(scorer) for scorer in self.scorers},
            "safety": self.safety,
            "limits": [self.limits.max_image_pixels, self.limits.min_side, self.limits.max_aspect],
        }


def with_embeddings(setup: ScoreSetup, embeddings: Artifact) -> ScoreSetup:
    """The setup that takes the image side of its CLIP, and safety if it is there, from ``embeddings``.

    Raises BadInput unless they are by the same CLIP, compared by the identity that fingerprints cover.
    """
    if embeddings.stage != EmbedStage.name:
        text = f"{embeddings.url}: an artifact of stage {embeddings.stage!r}"
        raise BadInput(f"{text}; --embeddings takes one of `capipe embed`")
    clips = tuple(scorer for scorer in setup.scorers if scorer.kind == "clip")
    theirs = embeddings.config["semantic"]
    for key, value in ScoreSetup(clips, setup.decode_workers, limits=setup.limits).semantic().items():
        changes = differences({key: theirs.get(key)}, {key: value}) if key != "safety" else []
        if changes:
            text = f"{embeddings.url}: embedded by another model than --clip {clips[0].model}, or in another way"
            raise BadInput(f"{text} ({changes[0]}); name that one, or leave out --embeddings")
    shard = next(iter(embeddings.committed()), None)
    if shard is None:
        raise BadInput(f"{embeddings.url}: no shard is committed there yet; finish its run")
    with embeddings.parquet(shard) as parquet:
        width = embedding_width(parquet.schema_arrow, f"{embeddings.url}/{shard}.parquet")
    return replace(setup, stored=StoredImages(width, bool(theirs.get("safety"))))


@dataclass(frozen=True)
class ScoreStage:
    """Everything a worker needs to score captions; picklable."""

    setup: ScoreSetup
    name: str = "score"

    def semantic(self) -> dict[str, Any]:
        return self.setup.semantic()

    async def load(self) -> ScoreProcessor:
        """Raises BadInput if embeddings have another width than their model."""
        return ScoreProcessor(self.setup)


Prepared = TypeVar("Prepared")
Subject = tuple[Row, int]  # with the index of its image

CHUNKS_COMPUTED = 4  # at a time, at most: each keeps its images and activations in memory


class ImageTextProcessor(Generic[Prepared]):
    """Common parts of processors with image models: chunks of rows, decoding processes, computing threads.

    Another thread prepares the next chunk's texts in the meantime: tokenizers, too, take a tenth of a small model's
    time. A chunk is computed by one thread from first to last layer, so results do not depend on the number of threads.
    """

    schema: pa.Schema
    chunk = CHUNK
    writes_tar = False

    def __init__(self, preprocesses: tuple[Preprocess, ...], setup: ScoreSetup) -> None:
        decode = functools.partial(decode_preprocessed, preprocesses=preprocesses, limits=setup.limits)
        devices = [device_and_type(scorer.device, scorer.dtype)[0] for scorer in setup.scorers]
        self._computers, threads = computing_threads(devices, CHUNKS_COMPUTED)
        self.window = (self._computers + 3) * CHUNK
        in_flight = (self._computers + 1) * CHUNK
        self._pool: DecodePool[Views] | None = None
        if preprocesses:
            self._pool = DecodePool(setup.decode_workers, decode, in_flight=in_flight)
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="capipe-prepare")
        self._threads = ThreadPoolExecutor(self._computers, "capipe-score", torch.set_num_threads, (threads,))
        self._decoding = self._computing = 0

    async def process(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        out = {row.index: finished for row in rows if (finished := self.unasked(row)) is not None}
        asked = [row for row in rows if row.index not in out]
        distinct = {row.uid: row for row in asked}  # an image shared by several rows is decoded once
        decoded = dict(zip(distinct, await asyncio.gather(*map(self.views, distinct.values())), strict=True))
        seen = {uid: views for uid, views in decoded.items() if not isinstance(views, ImageProblem)}
        numbers = {uid: number for number, uid in enumerate(seen)}
        for row in asked:
            if isinstance(problem := decoded[row.uid], ImageProblem):
                out[row.index] = {**self.passed_on(row), "status": str(problem.status), "error": problem.reason}
        subjects = [(row, numbers[row.uid]) for row in asked if row.uid in numbers]
        if subjects:
            self._computing += len(subjects)
            try:
                computed = await self._computed(subjects, list(seen.values()))
            finally:
                self._computing -= len(subjects)
            out |= {row.index: result for (row, _), result in zip(subjects, computed, strict=True)}
        return [out[row.index] for row in rows]

    async def _computed(self, subjects: Sequence[Subject], images: Sequence[Views]) -> list[dict[str, Any]]:
        """The output rows. If the chunk fails, only the rows that cause it fail, unless it is a device error."""
        loop = asyncio.get_running_loop()
        try:
            prepared = await loop.run_in_executor(self._preparer, self.prepare, subjects)
            computed = await loop.run_in_executor(self._threads, self.compute, prepared, images)
        except OF_DEVICES:
            raise
        except Exception:  # handled outside this block: the exception references the chunk's tensors
            pass
        else:
            answered()
            return computed
        computed, any_ok = await loop.run_in_executor(self._threads, self._apart, subjects, images)
        if any_ok:
            answered()
        return computed

    def _apart(self, subjects: Sequence[Subject], images: Sequence[Views]) -> tuple[list[dict[str, Any]], bool]:
        """The output rows of a failed chunk, and whether any succeeded; runs in a computing thread."""

        def compute(some: Sequence[Subject]) -> list[dict[str, Any]]:
            places = {number: index for index, number in enumerate(dict.fromkeys(number for _, number in some))}
            asked = [(row, places[number]) for row, number in some]
            prepared = self._preparer.submit(self.prepare, asked).result()
            return self.compute(prepared, [images[number] for number in places])

        outcomes, rows = by_halves(subjects, compute, OF_DEVICES), []
        for (row, number), outcome in zip(subjects, outcomes, strict=True):
            if isinstance(outcome, Exception):
                reason = self.reason(row, images[number], outcome)
                outcome = {**self.passed_on(row), "status": str(Status.ENGINE_ERROR), "error": reason}
            rows.append(outcome)
        return rows, not all(isinstance(outcome, Exception) for outcome in outcomes)

    def reason(self, row: Row, image: Views, error: Exception) -> str:
        """Why a row fails even by itself; runs in a computing thread."""
        return f"{type(error).__name__}: {error}"

    def unasked(self, row: Row) -> dict[str, Any] | None:
        """The output row for a row that needs no model; None for others."""
        raise NotImplementedError

    def prepare(self, subjects: Sequence[Subject]) -> Prepared:
        """The part that needs no model; runs in the preparing thread."""
        raise NotImplementedError

    def compute(self, prepared: Prepared, images: Sequence[Views]) -> list[dict[str, Any]]:
        """Output rows for prepared rows; runs in a computing thread, in parallel with others: models are stateless."""
        raise NotImplementedError

    def passed_on(self, row: Row) -> dict[str, Any]:
        raise NotImplementedError

    async def views(self, row: Row) -> Views | ImageProblem:
        """What the models get of a row's image, or its problem."""
        assert row.image is not None
        if self._pool is None:
            return ()
        self._decoding += 1
        try:
            return await self._pool.decode(row.image)
        finally:
            self._decoding -= 1

    def members(self, source: Row, row: dict[str, Any]) -> dict[str, bytes] | None:
        return None

    def gauges(self) -> dict[str, int]:
        return {"decoding": self._decoding, "in_engine": self._computing, "concurrency": self._computers * CHUNK}

    async def aclose(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._preparer.shutdown()
        self._threads.shutdown()


class ScoreProcessor(ImageTextProcessor[PreparedRows]):
    """The loaded stage."""

    schema = SCORE

    def __init__(self, setup: ScoreSetup) -> None:
        stored = setup.stored
        stored_safety = setup.safety and stored is not None and stored.safety
        scorers = tuple(_loaded(config, stored) for config in setup.scorers)
        safety = _detector() if setup.safety and not stored_safety else None
        self._scorer = CaptionScorer(scorers, safety, stored_safety)
        super().__init__(tuple(how for how in self._scorer.preprocesses if how is not None), setup)

    async def views(self, row: Row) -> Views | ImageProblem:
        decoded = await super().views(row)
        if isinstance(decoded, ImageProblem) or EMBEDDINGS not in row.beside:
            return decoded
        vector = row.beside[EMBEDDINGS][EMBEDDING_COLUMN]
        if vector is None:
            return ImageProblem(Status.ENGINE_ERROR, "it has no embedding; run `capipe embed` again with --retry")
        pixels = iter(decoded)
        return tuple(vector if how is None else next(pixels) for how in self._scorer.preprocesses)

    def unasked(self, row: Row) -> dict[str, Any] | None:
        return unscored(row)

    def prepare(self, subjects: Sequence[Subject]) -> PreparedRows:
        return self._scorer.prepare([SeenRow(row, captions_of(row), number) for row, number in subjects])

    def compute(self, prepared: PreparedRows, images: Sequence[Views]) -> list[dict[str, Any]]:
        return self._scorer.score(prepared, images)

    def reason(self, row: Row, image: Views, error: Exception) -> str:
        return self._scorer.reason(SeenRow(row, captions_of(row), 0), image, error)

    def passed_on(self, row: Row) -> dict[str, Any]:
        return passed_on(row)


def _detector() -> SafetyDetector:
    """Raises BadInput where its package is missing."""
    from ...models.scorers.safety import NudeNetDetector

    return NudeNetDetector()


def _loaded(config: ScorerConfig, stored: StoredImages | None) -> Scorer | StoredClip:
    """A scorer; a CLIP reads embeddings, if there are any. Raises BadInput if they are of another width."""
    if config.kind != "clip" or stored is None:
        return load_scorer(config)
    clip = StoredClip(load_clip(config.model, config.dtype, config.device))
    if clip.width != stored.width:
        text = f"--embeddings: of {stored.width} numbers each, and {config.model} has {clip.width}"
        raise BadInput(f"{text}; embed the images again, or leave out --embeddings")
    return clip


@dataclass(frozen=True)
class EmbedStage:
    """Image embeddings by a CLIP, for `capipe dedup` and `capipe filter`; picklable."""

    setup: ScoreSetup
    name: str = "embed"

    def semantic(self) -> dict[str, Any]:
        return self.setup.semantic()

    async def load(self) -> EmbedProcessor:
        return EmbedProcessor(self.setup)


class EmbedProcessor(ImageTextProcessor[Sequence[Subject]]):
    """The loaded stage: unit vectors of the vision encoder in half precision, and the safety detector's columns."""

    def __init__(self, setup: ScoreSetup) -> None:
        (config,) = setup.scorers
        self._clip = load_clip(config.model, config.dtype, config.device)
        self._safety = _detector() if setup.safety else None
        self.schema = embedding(self._clip.width, setup.safety)
        super().__init__((self._clip.preprocess, *((self._safety.preprocess,) if self._safety else ())), setup)

    def unasked(self, row: Row) -> dict[str, Any] | None:
        return None

    def prepare(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        return subjects

    def compute(self, prepared: Sequence[Subject], images: Sequence[Views]) -> list[dict[str, Any]]:
        vectors = self._clip.encode_images([views[0] for views in images]).half().tolist()
        columns: list[dict[str, Any]] = [{EMBEDDING_COLUMN: vector} for vector in vectors]
        if self._safety is not None:
            for own, labels in zip(columns, self._safety.detect([views[1] for views in images]), strict=True):
                own |= safety_columns(labels)
        return [{**self.passed_on(row), **columns[number]} for row, number in prepared]

    def passed_on(self, row: Row) -> dict[str, Any]:
        return {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error}
