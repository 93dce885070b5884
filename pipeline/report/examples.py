"""Example images with captions, questions and answers; removed rows with the reason.

Rows of one image have the same index in each artifact's shard, so a few rows are read from the first row groups of a
few shards.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...manifests.artifact_spec import RowPart
from ...manifests.status import QuestionStatus, Status
from ...stages.questions.grade import CONTROLS
from ..inspect.images import RowImages
from ..inspect.sampled import sampled
from ..inspect.shard_join import ShardJoin, ShardName
from ..specs import artifact_spec
from .render import cut, data_uri

IMAGES = 12
LOST = 3  # examples for each reason
_ROWS = 256  # of a shard, to choose images from
_SHARDS = 8  # of an artifact, to count reasons in
_INFORMATIVE = ("answers", "screened questions", "scores", "captions", "questions")  # beside the original text
_SCORES = re.compile(r"(re|org)_(clip|itm)_score(_min)?|(re|org)_vlm_min|unsafe|ask_\w+")


@dataclass(frozen=True)
class ShownCaption:
    """A caption with its artifact; ``status`` only if it is not ok."""

    artifact: str
    name: str
    text: str
    status: str | None = None


@dataclass(frozen=True)
class ShownQuestion:
    """A question with its options; ``right``: index of the right one. ``answers``: right and scored presentations,
    by captions.

    An open-ended one has the accepted answers as options; ``in_words``: what was answered, by captions.
    """

    question: str
    options: list[str]
    right: int | None
    status: str
    answers: dict[str, tuple[int, int]]
    in_words: dict[str, str] = field(default_factory=dict)


@dataclass
class ShownImage:
    """One image of the gallery. ``image``: data URI; None if the image cannot be read."""

    key: str
    image: str | None
    captions: list[ShownCaption] = field(default_factory=list)
    questions: list[ShownQuestion] = field(default_factory=list)
    scores: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class LostRow:
    """A removed row. ``image``: data URI; None if the image cannot be read."""

    key: str
    error: str
    caption: str | None
    image: str | None


@dataclass(frozen=True)
class Loss:
    """Rows of an artifact removed for one reason, with a few examples."""

    status: str
    reason: str
    count: int
    examples: list[LostRow]


@dataclass(frozen=True)
class Losses:
    """Removed rows of an artifact by reason, counted in ``seen`` of its ``shards`` with removed rows."""

    name: str
    losses: list[Loss]
    seen: int
    shards: int


# --- the gallery -----------------------------------------------------------------------------------------------------


def gallery(join: ShardJoin, images: RowImages, count: int = IMAGES) -> list[ShownImage]:
    """Images of the shard joined to the most kinds of artifacts, evenly spaced over its first rows."""
    base = _best(join)
    if base is None:
        return []
    tables = {shard: table for shard in (base, *join.beside(base)) if (table := head(join, shard)) is not None}
    if base not in tables:
        return []
    names = tables[base].select(["key", "uid", "status"]).to_pylist()
    sound = [index for index, row in enumerate(names) if row["status"] == Status.OK]
    shown = []
    for index in sound[:: max(1, len(sound) // count)][:count]:
        rows = {
            shard: table.slice(index, 1).to_pylist()[0]
            for shard, table in tables.items()
            if index < len(table) and table["uid"][index].as_py() == names[index]["uid"]
        }
        shown.append(_shown(join, images, base, names[index], rows))
    return shown


def _best(join: ShardJoin) -> ShardName | None:
    """First shard of the artifact joined to the most kinds of informative artifacts."""
    ranked: list[tuple[int, str, str]] = []
    for name, shards in join.records.items():
        first = next(iter(shards), None)
        if first is None or _shown_of(join, name) is None:
            continue
        shard = ShardName(name, first)
        parts = {_shown_of(join, other.artifact) for other in (shard, *join.beside(shard))}
        ranked.append((-sum(part in parts for part in _INFORMATIVE), name, first))
    # A training set's shards are joined to no captions or grades; ties are broken by name.
    return ShardName(min(ranked)[1], min(ranked)[2]) if ranked else None


def _shown_of(join: ShardJoin, name: str) -> RowPart | None:
    return artifact_spec(join.artifacts[name].stage).shown


def head(join: ShardJoin, shard: ShardName) -> pa.Table | None:
    """First rows of a shard; None if its Parquet cannot be read."""
    try:
        parquet = join.artifacts[shard.artifact].parquet(shard.shard)
        columns = [name for name in parquet.schema_arrow.names if name not in ("signature", "raw", "image_embedding")]
        batch = next(iter(parquet.iter_batches(_ROWS, columns=columns, use_threads=False)), None)
        return None if batch is None else pa.Table.from_batches([batch])
    except (OSError, ValueError, KeyError, CapipeError):
        return None


def _shown(
    join: ShardJoin,
    images: RowImages,
    base: ShardName,
    name: Mapping[str, Any],
    rows: Mapping[ShardName, dict[str, Any]],
) -> ShownImage:
    shown = ShownImage(str(name["key"]), data_uri(images.of(join, base, name)))
    questions: dict[str, ShownQuestion] = {}
    for shard, row in rows.items():
        part = _shown_of(join, shard.artifact)
        if part == "text" and row.get("text"):
            shown.captions.insert(0, ShownCaption(shard.artifact, "came with the image", cut(row["text"])))
        elif part == "captions":
            shown.captions += _captions(shard.artifact, row)
        elif part == "scores":
            scores = ((key, value) for key, value in row.items() if _SCORES.fullmatch(key) and value is not None)
            shown.scores += [(key, f"{value:.3f}") for key, value in scores]
        elif part in ("questions", "screened questions"):
            for question in row["questions"] or []:
                known = questions.get(question["id"])
                if question["question"] and (known is None or part == "screened questions"):
                    questions[question["id"]] = _question(question, known.answers if known else {})
            _add_open_ended(questions, row)
    for shard, row in rows.items():
        if _shown_of(join, shard.artifact) == "answers":
            _add_answers(questions, shard.artifact, row)
            _add_open_ended(questions, row)
            _add_words(questions, shard.artifact, row)
    shown.questions = sorted(questions.values(), key=lambda question: question.status != QuestionStatus.OK)
    return shown


def _captions(artifact: str, row: Mapping[str, Any]) -> Iterator[ShownCaption]:
    for caption in row["captions"] or []:
        if caption["text"] and "#" not in caption["name"]:
            status = None if caption["status"] == Status.OK else caption["status"]
            yield ShownCaption(artifact, caption["name"], cut(caption["text"]), status)


def _question(question: Mapping[str, Any], answers: dict[str, tuple[int, int]]) -> ShownQuestion:
    options = question["options"] or []
    return ShownQuestion(question["question"], options, question["answer"], question["status"], answers)


def _add_answers(questions: Mapping[str, ShownQuestion], artifact: str, row: Mapping[str, Any]) -> None:
    """Add to each question the number of right answers from each system's captions."""
    for caption in row["captions"] or []:
        system = caption["name"].partition("#")[0]
        if system in CONTROLS:
            continue
        for answer in caption["answers"] or []:
            if answer["id"] in questions and answer["scored"]:
                name = f"{artifact.rpartition('/')[0] or artifact}: {system}"
                right, scored = questions[answer["id"]].answers.get(name, (0, 0))
                questions[answer["id"]].answers[name] = right + answer["right"], scored + answer["scored"]


def _add_open_ended(questions: dict[str, ShownQuestion], row: Mapping[str, Any]) -> None:
    for question in row.get("open_questions") or []:
        if question["id"] not in questions:
            accepted = [cut(answer) for answer in question["answers"] or []]
            questions[question["id"]] = ShownQuestion(question["question"], accepted, None, QuestionStatus.OK, {})


def _add_words(questions: Mapping[str, ShownQuestion], artifact: str, row: Mapping[str, Any]) -> None:
    """Add to each open-ended question the answer in words from each system's first caption."""
    for answer in row.get("open_answers") or []:
        system = answer["name"].partition("#")[0]
        if system not in CONTROLS and answer["id"] in questions:
            said = "–" if answer["answer"] is None else cut(answer["answer"])
            name = f"{artifact.rpartition('/')[0] or artifact}: {system}"
            questions[answer["id"]].in_words.setdefault(name, said)


# --- removed rows ----------------------------------------------------------------------------------------------------


def losses(join: ShardJoin, images: RowImages) -> list[Losses]:
    """Removed rows by artifact and reason; exports are skipped, since their removed rows are those of their input."""
    by_artifact = []
    for name, records in join.records.items():
        artifact = join.artifacts[name]
        marked = [shard for shard, record in records.items() if any(s != Status.OK for s in record.rows)]
        if not marked or artifact_spec(artifact.stage).copies:
            continue
        try:
            by_artifact.append(_losses(join, images, name, artifact, marked))
        except (OSError, ValueError, KeyError, CapipeError):
            continue
    return by_artifact


def _losses(join: ShardJoin, images: RowImages, name: str, artifact: Artifact, marked: list[str]) -> Losses:
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[LostRow]] = defaultdict(list)
    seen = sampled(marked, _SHARDS)
    for shard in seen:
        parquet = artifact.parquet(shard)
        table = parquet.read(columns=["status", "error"], use_threads=False)
        removed = pc.indices_nonzero(pc.not_equal(table["status"], str(Status.OK))).to_pylist()
        chosen: dict[int, tuple[str, str]] = {}
        for index, row in zip(removed, table.take(removed).to_pylist(), strict=True):
            reason = row["status"], _reason(row)
            counts[reason] += 1
            if len(examples[reason]) + list(chosen.values()).count(reason) < LOST and len(chosen) < 100:
                chosen[index] = reason
        wanted = {"key", "error", "re_caption", "org_caption", "text", "source_shard", "source_key"}
        columns = [column for column in parquet.schema_arrow.names if column in wanted]
        rows = parquet.read(columns=columns, use_threads=False).take(pa.array(chosen, pa.int64())).to_pylist()
        for row, reason in zip(rows, chosen.values(), strict=True):
            image = data_uri(images.of(join, ShardName(name, shard), row))
            caption = row.get("re_caption") or row.get("org_caption") or row.get("text")
            lost = LostRow(str(row["key"]), cut(row["error"] or ""), cut(caption) if caption else None, image)
            examples[reason].append(lost)
    ranked = [Loss(*reason, count, examples[reason]) for reason, count in counts.most_common(12)]
    return Losses(name, ranked, len(seen), len(marked))


def _reason(row: Mapping[str, Any]) -> str:
    """Condition that a filtered row failed; empty for other statuses, which are reasons themselves."""
    return failed_condition(row["error"]) if row["status"] == Status.FILTERED else ""


def failed_condition(error: str | None) -> str:
    """Condition that a filtered row failed, without the row's value."""
    return cut((error or "").partition(": ")[0])
