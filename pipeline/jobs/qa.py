"""`capipe qa`: the stages that write (or import) and screen questions, as descriptions and in loaded form."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...errors import BadInput
from ...manifests.files.stores import filesystem
from ...manifests.schema import QUESTIONS, QUESTIONS_WITH_OPEN, SCREEN
from ...manifests.shards import InputShard, Row, RowReader
from ...manifests.status import Status
from ...models.engines.loading import EngineConfig, vllm_runs
from ...models.images.formats import ImageProblem
from ...models.reader import QuizReader
from ...stages.questions import screen, write
from ...stages.questions.distractors import close_sets
from ...stages.questions.import_sets import read_question_set
from ...stages.questions.match import Found, ImageNames, QuestionIndex, Unmatched
from ...stages.questions.open_ended import stored
from ...stages.questions.screen import ScreenConfig, Screener
from ...stages.questions.write import QuestionsConfig, QuestionWriter
from ..runners.worker import RowByRow
from .rows.engine import REQUESTS_PER_ROW, EngineSetup, LoadedEngine, SidecarProcessor

_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\[.*\]|\d+")  # details that differ between reasons of one kind


@dataclass(frozen=True)
class QuestionsStage:
    """Everything a worker needs to write questions; picklable. ``guided``: constrain the model to the JSON schema."""

    config: QuestionsConfig
    setup: EngineSetup
    model_name: str
    guided: bool
    name: str = "questions"

    def semantic(self) -> dict[str, Any]:
        """Settings covered by the fingerprint; ``guided`` is one, since guided and free answers differ."""
        config = self.config.model_dump(mode="json")
        prompts = {"prompt": self.config.prompt.text}
        if self.config.absent:
            prompts["absent_prompt"] = self.config.absent_prompt.text
        return {**self.setup.semantic(), "questions": config, **prompts, "guided": self.guided}

    async def load(self) -> QuestionsProcessor:
        loaded = await (await self.setup.load()).check_sampling(self.config.sampling)
        return QuestionsProcessor(self, loaded)


class QuestionsProcessor(SidecarProcessor):
    """The loaded stage."""

    schema = QUESTIONS

    def __init__(self, stage: QuestionsStage, loaded: LoadedEngine) -> None:
        super().__init__(loaded, lambda concurrency: 2 * concurrency + 4 * stage.setup.decode_workers)
        self._writer = QuestionWriter(loaded.engine, stage.model_name, stage.config, stage.guided)

    async def process_row(self, row: Row) -> dict[str, Any]:
        image = await self._loaded.image(row)
        if isinstance(image, ImageProblem):
            return {**write.passed_on(row), "status": str(image.status), "error": image.reason}
        return await self._writer.write(row, image)

    def passed_on(self, row: Row) -> dict[str, Any]:
        return write.passed_on(row)


@dataclass(frozen=True)
class ScreenStage:
    """Everything a worker needs to screen questions; picklable."""

    config: ScreenConfig
    setup: EngineSetup
    model_name: str
    name: str = "screen"

    def semantic(self) -> dict[str, Any]:
        return {**self.setup.semantic(), "screen": self.config.model_dump(mode="json")}

    async def load(self) -> ScreenProcessor:
        loaded = await self.setup.load()
        return ScreenProcessor(self, await loaded.check(self.config.reader))


class ScreenProcessor(SidecarProcessor):
    """The loaded stage. Images of rows without questions are not decoded."""

    schema = SCREEN

    def __init__(self, stage: ScreenStage, loaded: LoadedEngine) -> None:
        ahead = 2 + 4 * stage.setup.decode_workers
        super().__init__(loaded, lambda concurrency: ahead + 2 * concurrency // REQUESTS_PER_ROW)
        reader = QuizReader(loaded.engine, stage.config.reader)
        self._screener = Screener(reader, stage.model_name, stage.config)

    async def process_row(self, row: Row) -> dict[str, Any]:
        if row.beside[screen.QUESTIONS]["status"] != Status.OK:
            return screen.passed_on(row)
        image = await self._loaded.image(row)
        if isinstance(image, ImageProblem):
            return {**screen.passed_on(row), "status": str(image.status), "error": image.reason}
        return await self._screener.screen(row, image)

    def passed_on(self, row: Row) -> dict[str, Any]:
        return screen.passed_on(row)


@dataclass(frozen=True)
class ImportStage:
    """Imports questions from an existing set. ``distractors``: wrong options for open-ended ones, 0 for none;
    ``open_ended``: keep those without options, for readers that answer in words."""

    path: str
    shards: tuple[InputShard, ...]
    distractors: int = 0
    seed: int = 0
    open_ended: bool = False
    name: str = "questions"
    setup: None = None

    def semantic(self) -> dict[str, Any]:
        kept = {"open_ended": True} if self.open_ended else {}  # absent as in folders of earlier versions
        return {"imported": _digest(self.path), "distractors": self.distractors, "seed": self.seed, **kept}

    @cached_property
    def index(self) -> QuestionIndex:
        """The whole set, joined with all images. Raises BadInput if it cannot be read."""
        records = read_question_set(self.path)
        if self.distractors:
            records = iter(close_sets(records, seed=self.seed, distractors=self.distractors))
        return QuestionIndex(records, self.names.values(), self.open_ended)

    def refused(self) -> str | None:
        """Number of unusable questions about the images, and why; None if all can be used.

        Raises BadInput if none can be used, or there are none.
        """
        matches = (self.index.lookup(names.uid, names.key, names.source) for names in self.names.values())
        about = [match for match in matches if match is not None]
        if not about:
            first = next(iter(self.index.unmatched()), None)
            named = f": {first.where} names {first.image!r}, {first.reason}" if first else ""
            raise BadInput(
                f"{self.path}: no question is about an image of the shards{named}; give those that hold them"
            )
        entries = [entry for match in about for entry in match.questions]
        bad = [entry for entry in entries if entry["status"] != Status.OK]
        if len(bad) == len(entries) and not any(match.open_ended for match in about):
            why = commonest_reasons(bad) or next((match.error for match in about if match.error), "no question is left")
            raise BadInput(f"{self.path}: none of its {len(entries)} questions about the images can be used: {why}")
        return f"{len(bad)} of {len(entries)} questions cannot be used: {commonest_reasons(bad)}" if bad else None

    def repeated(self) -> int:
        """Number of images with questions that the shards hold several times."""
        copies = Counter(names.uid for names in self.names.values() if names.uid is not None)
        named = {names.uid: names for names in self.names.values()}
        several = [named[uid] for uid, count in copies.items() if count > 1]
        return sum(self.index.lookup(names.uid, names.key, names.source) is not None for names in several)

    @cached_property
    def names(self) -> dict[str, ImageNames]:
        return {names.key: names for shard in self.shards for names in image_names(shard)}

    def unmatched(self) -> list[Unmatched]:
        """Records that match no image."""
        return self.index.unmatched()

    async def load(self) -> ImportProcessor:
        return ImportProcessor(self)


class ImportProcessor(RowByRow):
    """The loaded stage: lookups only."""

    schema = QUESTIONS
    window = 64
    writes_tar = False

    def __init__(self, stage: ImportStage) -> None:
        self._stage = stage
        self.schema = QUESTIONS_WITH_OPEN if stage.open_ended else QUESTIONS

    async def process_row(self, row: Row) -> dict[str, Any]:
        out = write.passed_on(row)
        names = self._stage.names[row.key]
        match = self._stage.index.lookup(row.uid, row.key, names.source)
        if match is None:
            return {**out, "status": str(Status.EMPTY), "error": "the set has no question about this image"}
        opened = {"open_questions": [stored(each) for each in match.open_ended]} if self._stage.open_ended else {}
        return {**out, **_imported(match), **opened, "writer": self._stage.path}

    def passed_on(self, row: Row) -> dict[str, Any]:
        return write.passed_on(row)

    def members(self, source: Row, row: dict[str, Any]) -> dict[str, bytes] | None:
        return None

    def gauges(self) -> dict[str, int]:
        return {}

    async def aclose(self) -> None: ...


def _imported(match: Found) -> dict[str, Any]:
    usable = bool(match.open_ended) or any(entry["status"] == Status.OK for entry in match.questions)
    status, error = (Status.OK, match.error) if usable else (Status.EMPTY, match.error or "no question can be used")
    return {"status": str(status), "error": error, "questions": match.questions, "raw": match.raw.splitlines()}


def commonest_reasons(write: Sequence[Mapping[str, Any]], most: int = 3) -> str:
    """The most common reasons for refused questions, each with its count and, for several of a kind, the first."""
    kinds = Counter[str]()
    first: dict[str, str] = {}
    for entry in write:
        kind = _PARTICULARS.sub("", f"{entry['status']}: {entry['error']}")
        kinds[kind] += 1
        first.setdefault(kind, f"{entry['status']}: {entry['error']}")
    texts = [f"{count} {first[kind]}" for kind, count in kinds.most_common(most)]
    others = sum(count for _, count in kinds.most_common()[most:])
    return "; ".join(texts + ([f"{others} for other reasons"] if others else []))


def unmatched_lines(records: list[Unmatched]) -> bytes:
    """Unmatched records as JSON lines, stored beside the artifact."""
    lines = [json.dumps({"where": r.where, "image": r.image, "reason": r.reason}, ensure_ascii=False) for r in records]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def image_names(shard: InputShard) -> Iterator[ImageNames]:
    """Names of a shard's images. A foreign tar is read for them; one of ours has a list."""
    if shard.record is None:
        yield from (ImageNames(row.key, None, row.uid) for row in RowReader(shard))
        return
    with shard.listing() as parquet:
        wanted = [name for name in ("key", "source", "uid") if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(10_000, columns=wanted, use_threads=False):
            yield from (ImageNames(row["key"], row.get("source"), row["uid"]) for row in batch.to_pylist())


def _digest(path: str) -> str:
    """sha256 over a question set's files."""
    fs, inner = filesystem(path)
    if not fs.exists(inner):
        raise BadInput(f"{path}: no such file or folder; --import takes a question set (JSON, JSONL, Parquet, CSV)")
    digest = hashlib.sha256()
    for name in sorted(fs.find(inner)):
        with fs.open(name) as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def engine_guides(config: EngineConfig) -> bool:
    """True if the engine that ``config`` starts supports guided decoding by a JSON schema."""
    return config.is_http or config.kind == "vllm" or (config.kind == "auto" and vllm_runs())
