"""Pictures with all that was said, asked and answered about them, and pictures that filtering took out, with why.

Rows of one image lie at the same place in each artifact's shard, so a few of them are read from a few shards; only
their row groups are.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...manifests.status import QuestionStatus, Status
from ...stages.questions.grade import CONTROLS
from ..inspect.images import Pictures
from ..inspect.shard_join import ShardJoin, ShardName
from .facts import sampled
from .render import cut, data_uri

PICTURES = 12
LOST = 3  # examples for each reason
_ROWS = 256  # of a shard that pictures are chosen from
_SHARDS = 8  # of an artifact in which reasons are counted
_TELLING = ("grade", "screen", "score", "annotate", "questions")
_SCORES = re.compile(r"(re|org)_(clip|itm)_score(_min)?|unsafe")


@dataclass(frozen=True)
class Said:
    """A caption and whose it is; ``status`` where it is not ok."""

    source: str
    name: str
    text: str
    status: str | None = None


@dataclass(frozen=True)
class Asked:
    """A question with its options; ``right`` is the index of the right one. ``answers``: by captions, of so many
    presentations how many were answered right."""

    kind: str
    question: str
    options: Sequence[str]
    right: int | None
    status: str
    answers: dict[str, tuple[int, int]]


@dataclass
class Shown:
    """One picture. ``image`` is a data URI, None where there is none."""

    key: str
    image: str | None
    said: list[Said] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    scores: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Loss:
    """Rows of an artifact that a reason took out; ``examples``: key, the whole reason, caption, picture."""

    status: str
    reason: str
    count: int
    examples: list[tuple[str, str, str | None, str | None]]


@dataclass(frozen=True)
class Losses:
    """What an artifact lost, by reason, counted in ``seen`` of its ``shards``."""

    name: str
    stage: str
    losses: list[Loss]
    seen: int
    shards: int


# --- pictures --------------------------------------------------------------------------------------------------------


def gallery(joins: ShardJoin, pictures: Pictures, count: int = PICTURES) -> list[Shown]:
    """Pictures of the shard that most is known about, evenly spread over its first rows."""
    place = _best(joins)
    if place is None:
        return []
    places = [place, *joins.beside(place)]
    tables = {each: table for each in places if (table := _head(joins, each)) is not None}
    if place not in tables:
        return []
    base = tables[place].select(["key", "uid", "status"]).to_pylist()
    sound = [index for index, row in enumerate(base) if row["status"] == Status.OK]
    shown = []
    for index in sound[:: max(1, len(sound) // count)][:count]:
        rows = {
            each: table.slice(index, 1).to_pylist()[0]
            for each, table in tables.items()
            if index < len(table) and table["uid"][index].as_py() == base[index]["uid"]
        }
        shown.append(_shown(joins, pictures, place, base[index], rows))
    return shown


def _best(joins: ShardJoin) -> ShardName | None:
    """The shard with the most telling artifacts beside it; its own artifact is the most telling one."""
    ranked: list[tuple[int, str, str]] = []
    for name, shards in joins.records.items():
        first = next(iter(shards), None)
        if first is None or joins.artifacts[name].stage not in (*_TELLING, "ingest"):
            continue
        place = ShardName(name, first)
        stages = {joins.artifacts[each.artifact].stage for each in (place, *joins.beside(place))}
        ranked.append((-sum(stage in stages for stage in _TELLING), name, first))
    # A training set's shards have captions of nobody: a grade beside them decides, then the order of names.
    return ShardName(min(ranked)[1], min(ranked)[2]) if ranked else None


def _head(joins: ShardJoin, place: ShardName) -> pa.Table | None:
    """The first rows of a shard; None where its Parquet cannot be read."""
    try:
        parquet = joins.artifacts[place.artifact].parquet(place.shard)
        columns = [name for name in parquet.schema_arrow.names if name not in ("signature", "raw", "image_embedding")]
        batch = next(iter(parquet.iter_batches(_ROWS, columns=columns, use_threads=False)), None)
        return None if batch is None else pa.Table.from_batches([batch])
    except (OSError, ValueError, KeyError, CapipeError):
        return None


def _shown(
    joins: ShardJoin,
    pictures: Pictures,
    place: ShardName,
    base: Mapping[str, Any],
    rows: Mapping[ShardName, dict[str, Any]],
) -> Shown:
    shown = Shown(str(base["key"]), data_uri(pictures.of(joins, place, base)))
    questions: dict[str, Asked] = {}
    for each, row in rows.items():
        stage = joins.artifacts[each.artifact].stage
        if stage == "ingest" and row.get("text"):
            shown.said.insert(0, Said(each.artifact, "came with the image", cut(row["text"])))
        elif stage == "annotate":
            shown.said += _captions(each.artifact, row)
        elif stage == "score":
            scores = ((key, value) for key, value in row.items() if _SCORES.fullmatch(key) and value is not None)
            shown.scores += [(key, f"{value:.3f}") for key, value in scores]
        elif stage in ("screen", "questions"):
            for asked in row["questions"] or []:
                known = questions.get(asked["id"])
                if asked["question"] and (known is None or stage == "screen"):
                    questions[asked["id"]] = _asked(asked, known.answers if known else {})
    for each, row in rows.items():
        if joins.artifacts[each.artifact].stage == "grade":
            _take_answers(questions, each.artifact, row)
    shown.asked = sorted(questions.values(), key=lambda each: each.status != QuestionStatus.OK)
    return shown


def _captions(source: str, row: Mapping[str, Any]) -> Iterator[Said]:
    for caption in row["captions"] or []:
        if caption["text"] and "#" not in caption["name"]:
            status = None if caption["status"] == Status.OK else caption["status"]
            yield Said(source, caption["name"], cut(caption["text"]), status)


def _asked(asked: Mapping[str, Any], answers: dict[str, tuple[int, int]]) -> Asked:
    options = asked["options"] or []
    return Asked(asked["kind"] or "", asked["question"], options, asked["answer"], asked["status"], answers)


def _take_answers(questions: Mapping[str, Asked], source: str, row: Mapping[str, Any]) -> None:
    """Put beside each question how often it was answered right from each system's captions."""
    for caption in row["captions"] or []:
        system = caption["name"].partition("#")[0]
        if system in CONTROLS:
            continue
        for answer in caption["answers"] or []:
            if answer["id"] in questions and answer["scored"]:
                name = f"{source.rpartition('/')[0] or source}: {system}"
                right, scored = questions[answer["id"]].answers.get(name, (0, 0))
                questions[answer["id"]].answers[name] = right + answer["right"], scored + answer["scored"]


# --- what was lost ---------------------------------------------------------------------------------------------------


def losses(joins: ShardJoin, pictures: Pictures) -> list[Losses]:
    """Why rows are gone, artifact by artifact; rows that were lost before (an export's, say) are named there alone."""
    found = []
    for name, records in joins.records.items():
        artifact = joins.artifacts[name]
        marked = [shard for shard, record in records.items() if any(s != Status.OK for s in record.rows)]
        if not marked or artifact.stage == "export":
            continue
        try:
            found.append(_losses(joins, pictures, name, artifact, marked))
        except (OSError, ValueError, KeyError, CapipeError):
            continue
    return found


def _losses(joins: ShardJoin, pictures: Pictures, name: str, artifact: Artifact, marked: list[str]) -> Losses:
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[tuple[str, str, str | None, str | None]]] = defaultdict(list)
    seen = sampled(marked, _SHARDS)
    for shard in seen:
        parquet = artifact.parquet(shard)
        table = parquet.read(columns=["status", "error"], use_threads=False)
        gone = pc.indices_nonzero(pc.not_equal(table["status"], str(Status.OK))).to_pylist()
        chosen: dict[int, tuple[str, str]] = {}
        for index, row in zip(gone, table.take(gone).to_pylist(), strict=True):
            reason = row["status"], _reason(row)
            counts[reason] += 1
            if len(examples[reason]) + list(chosen.values()).count(reason) < LOST and len(chosen) < 100:
                chosen[index] = reason
        wanted = {"key", "error", "re_caption", "org_caption", "text", "source_shard", "source_key"}
        columns = [column for column in parquet.schema_arrow.names if column in wanted]
        rows = parquet.read(columns=columns, use_threads=False).take(list(chosen)).to_pylist()
        for row, reason in zip(rows, chosen.values(), strict=True):
            picture = data_uri(pictures.of(joins, ShardName(name, shard), row))
            caption = row.get("re_caption") or row.get("org_caption") or row.get("text")
            told = cut(caption) if caption else None
            examples[reason].append((str(row["key"]), cut(row["error"] or ""), told, picture))
    ranked = [Loss(*reason, count, examples[reason]) for reason, count in counts.most_common(12)]
    return Losses(name, artifact.stage, ranked, len(seen), len(marked))


def _reason(row: Mapping[str, Any]) -> str:
    """What rows that are gone for the same cause have in common."""
    return failed_condition(row["error"]) if row["status"] == Status.FILTERED else ""


def failed_condition(error: str | None) -> str:
    """The condition that a filtered row failed, without the row's value."""
    return cut((error or "").partition(": ")[0])
