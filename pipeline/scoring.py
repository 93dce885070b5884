"""The scoring stage of `capipe filter`, described and loaded."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..manifests.schema import SCORE
from ..manifests.shards import Row
from ..models.decode import DecodePool
from ..models.formats import ImageProblem
from ..models.images import ImageLimits, Pixels
from ..models.scorers import ScorerConfig, load_scorer, scorer_identity
from ..models.views import decode_views
from ..stages.score import CHUNK, CaptionScorer, SafetyDetector, SeenRow, captions_of, passed_on, unscored

Views = tuple[Pixels, ...]


@dataclass(frozen=True)
class ScoreSetup:
    """Which models score, and how images come to them; picklable."""

    scorers: tuple[ScorerConfig, ...]
    decode_workers: int
    safety: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)

    def provenance(self) -> dict[str, Any]:
        return {"models": {scorer.kind: scorer.model for scorer in self.scorers}}

    def semantic(self) -> dict[str, Any]:
        return {
            "scorers": {scorer.kind: scorer_identity(scorer) for scorer in self.scorers},
            "safety": self.safety,
            "limits": [self.limits.max_image_pixels, self.limits.min_side, self.limits.max_aspect],
        }


@dataclass(frozen=True)
class ScoreStage:
    """Everything a worker needs to score captions; picklable."""

    setup: ScoreSetup
    name: str = "score"

    def semantic(self) -> dict[str, Any]:
        return self.setup.semantic()

    async def load(self) -> ScoreProcessor:
        return ScoreProcessor(self.setup)


class ScoreProcessor:
    """The loaded stage: images decoded in processes, scored chunk by chunk in a thread of its own."""

    schema = SCORE
    window = 4 * CHUNK
    chunk = CHUNK
    writes_tar = False

    def __init__(self, setup: ScoreSetup) -> None:
        safety: SafetyDetector | None = None
        if setup.safety:
            from ..models.safety import NudeNetDetector

            safety = NudeNetDetector()
        self._scorer = CaptionScorer(tuple(load_scorer(each) for each in setup.scorers), safety)
        decode = functools.partial(decode_views, views=self._scorer.views, limits=setup.limits)
        self._pool: DecodePool[Views] = DecodePool(setup.decode_workers, decode, in_flight=2 * CHUNK)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="capipe-score")
        self._decoding = self._scoring = 0

    async def process(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        out = {row.index: given for row in rows if (given := unscored(row)) is not None}
        asked = [row for row in rows if row.index not in out]
        distinct = {row.uid: row for row in asked}
        decoded = await asyncio.gather(*(self._decode(row) for row in distinct.values()))
        seen = {uid: views for uid, views in zip(distinct, decoded, strict=True) if not isinstance(views, ImageProblem)}
        problems = {uid: views for uid, views in zip(distinct, decoded, strict=True) if isinstance(views, ImageProblem)}
        out |= {row.index: _unseen(row, problems[row.uid]) for row in asked if row.uid in problems}
        numbers = {uid: number for number, uid in enumerate(seen)}
        subjects = [SeenRow(row, captions_of(row), numbers[row.uid]) for row in asked if row.uid in numbers]
        if subjects:
            self._scoring += len(subjects)
            try:
                loop = asyncio.get_running_loop()
                scored = await loop.run_in_executor(self._thread, self._scorer.score, subjects, list(seen.values()))
            finally:
                self._scoring -= len(subjects)
            out |= {subject.row.index: row for subject, row in zip(subjects, scored, strict=True)}
        return [out[row.index] for row in rows]

    async def _decode(self, row: Row) -> Views | ImageProblem:
        assert row.image is not None
        self._decoding += 1
        try:
            return await self._pool.decode(row.image)
        finally:
            self._decoding -= 1

    def passed_on(self, row: Row) -> dict[str, Any]:
        return passed_on(row)

    def members(self, source: Row, row: dict[str, Any]) -> dict[str, bytes] | None:
        return None

    def gauges(self) -> dict[str, int]:
        return {"decoding": self._decoding, "in_engine": self._scoring, "concurrency": CHUNK}

    async def aclose(self) -> None:
        self._pool.close()
        self._thread.shutdown()


def _unseen(row: Row, problem: ImageProblem) -> dict[str, Any]:
    return {**passed_on(row), "status": str(problem.status), "error": problem.reason}
