"""Report of a selection: settings, counts, scores with thresholds, and kept rows beside filtered ones.

Deterministic: the same selection gives the same page. Samples are the rows with the smallest uids, which are hashes, so
another threshold shows the same images.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from markupsafe import Markup

from ...manifests.artifact import Artifact
from ...manifests.expressions.parser import shown_value
from ...manifests.files.compressed import plain
from ...manifests.samples import read_samples
from ...manifests.shards import InputShard
from ...manifests.status import Status
from ...models.scorers.sentences import split_sentences
from ...stages.filter.select import Rule
from ..inspect.histograms import SERIES, histograms
from .charts import histogram_chart
from .examples import failed_condition
from .render import cut, data_uri, render

SAMPLES = 12  # of kept rows, and of filtered rows
_CONDITIONS = 20  # the most frequent ones
_TITLES = {Status.OK: "Kept", Status.FILTERED: "Filtered"}
_SCORES = [f"{scorer}_score{part}" for scorer in ("clip", "itm") for part in ("", "_mean", "_min")]
_CHECKED = ["vlm_min", "vlm_mean"]  # joined, if a vision-language model checked sentences


@dataclass(frozen=True)
class ScoredCaption:
    """A caption with its scores; ``lowest``: lowest-scoring sentence, by scorer."""

    series: str
    text: str
    scores: str
    lowest: Mapping[str, str]


@dataclass(frozen=True)
class Sample:
    """A row of the final shards. ``image``: data URI; None if the image could not be read."""

    key: str
    uid: str
    image: str | None
    error: str | None
    captions: Sequence[ScoredCaption]


def filter_report(artifact: Artifact, rule: Rule, shards: Sequence[InputShard]) -> bytes:
    """The report of a complete selection from ``shards``."""
    statuses, conditions = _counts(artifact)
    run = artifact.config["run"]
    return render(
        "filter.html.j2",
        title="What was kept",
        settings=_settings(artifact, rule),
        kept=run["kept"],
        candidates=run["candidates"],
        statuses=statuses,
        conditions=conditions.most_common(_CONDITIONS),
        charts=_charts(artifact, rule),
        sides=_sides(artifact, shards),
    )


def _settings(artifact: Artifact, rule: Rule) -> dict[str, str]:
    semantic, run = artifact.config["semantic"], artifact.config["run"]
    joined = {name: f"{run[name]} ({semantic[name][:12]})" for name in sorted(semantic) if name.startswith("scores-")}
    missing = (f"{count:,} of {run['candidates']:,} candidates in {label}" for label, count in _missing(run))
    settings = {
        "conditions": rule.config.shown,
        "threshold": f"{rule.config.by} >= {rule.threshold_text}" if rule.by else None,
        "captions written": SERIES.get(rule.text, "none"),
        "scores": f"{run['scores']} ({semantic['scores'][:12]})",
        **joined,
        "without a value": "; ".join(missing) or None,
        "fingerprint": artifact.fingerprint[:12],
    }
    return {name: value for name, value in settings.items() if value is not None}


def _missing(run: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Joined sources that lack values of candidates, and of how many."""
    return sorted((label, count) for label, count in (run.get("missing") or {}).items() if count)


def _counts(artifact: Artifact) -> tuple[Counter[str], Counter[str]]:
    """Rows by status, and filtered rows by failed condition."""
    statuses: Counter[str] = Counter()
    conditions: Counter[str] = Counter()
    for record in artifact.committed().values():
        statuses.update(record.rows)
        table = artifact.table(record.shard, ["status", "error"])
        errors = table.filter(pc.equal(table.column("status"), str(Status.FILTERED))).column("error")
        conditions.update(map(failed_condition, errors.to_pylist()))
    return statuses, conditions


def _charts(artifact: Artifact, rule: Rule) -> list[Markup]:
    """Histograms of the scores, of other numeric columns in the rule, of joined ones, and of ``unsafe``."""
    of_marks = {*rule.mark_columns}  # the final shards do not have these
    used = [column.name for column in (rule.keep.columns if rule.keep else ()) if column.kind == "number"]
    used = [name for name in used if name not in of_marks]
    used += [rule.by] if rule.by else []
    names = [*_SCORES, *(re.sub("^(re|org)_", "", name) for name in used), *rule.config.joined_numbers, "unsafe"]
    return list(map(histogram_chart, histograms(artifact, list(dict.fromkeys(names)), rule.bounds())))


# --- samples ---------------------------------------------------------------------------------------------------------


def _sides(artifact: Artifact, shards: Sequence[InputShard]) -> dict[str, list[Sample]]:
    """Samples by title."""
    rows = {title: sorted(_sampled(artifact, status), key=_uid) for status, title in _TITLES.items()}
    images = _images(shards, [row for side in rows.values() for row in side])
    return {title: [_sample(row, images.get(_source(row))) for row in side] for title, side in rows.items()}


def _sampled(artifact: Artifact, status: Status) -> list[dict[str, Any]]:
    """Rows of a status with the smallest uids, one per uid. Keeps a few rows per shard in memory."""
    chosen: dict[str, tuple[str, int]] = {}  # uid -> shard and index
    for shard in artifact.committed():
        table = artifact.table(shard, ["uid", "status"])
        uids = table.column("uid").combine_chunks()
        own = uids.filter(pc.equal(table.column("status"), str(status)).combine_chunks()).drop_null().unique()
        for uid in own.take(pc.array_sort_indices(own)[:SAMPLES]).to_pylist():
            if uid not in chosen:
                same = pc.and_(pc.equal(uids, uid), pc.equal(table.column("status").combine_chunks(), str(status)))
                chosen[uid] = (shard, pc.index(same, True).as_py())
        chosen = dict(sorted(chosen.items())[:SAMPLES])
    return [row for shard in artifact.committed() for row in _rows(artifact, shard, chosen.values())]


def _rows(artifact: Artifact, shard: str, wanted: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    """Wanted rows of a shard."""
    indices = [index for other, index in wanted if other == shard]
    if not indices:
        return []
    rows: list[dict[str, Any]] = artifact.table(shard).take(indices).to_pylist()
    return rows


def _uid(row: Mapping[str, Any]) -> str:
    return str(row["uid"])


def _source(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["source_shard"], row["source_key"]


def _images(shards: Sequence[InputShard], rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str | None]:
    """Data URIs by shard and key, from the input shards: final shards have no rejected images."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        wanted[row["source_shard"]].add(row["source_key"])
    return {
        (shard.name, key): data_uri(data)
        for shard in shards
        for key, data in _read_images(shard, wanted.get(shard.name, set()))
    }


def _read_images(shard: InputShard, keys: set[str]) -> Iterator[tuple[str, bytes]]:
    """Named images of a shard. Reads headers up to the last of them, and the images' data only."""
    if not keys:
        return
    with plain(shard.open()) as stream:
        members = {}
        for sample in read_samples(stream, read_data=False):
            image = sample.image()
            if sample.key in keys and image is not None:
                members[sample.key] = image
                if len(members) == len(keys):
                    break
        for key, image in members.items():
            stream.seek(image.offset)
            yield key, stream.read(image.size)


def _sample(row: Mapping[str, Any], image: str | None) -> Sample:
    captions = [_caption(row, prefix) for prefix in SERIES if row[f"{prefix}_caption"] is not None]
    return Sample(f"{row['source_shard']}/{row['source_key']}", _uid(row), image, row["error"], captions)


def _caption(row: Mapping[str, Any], prefix: str) -> ScoredCaption:
    """One caption of a row with its scores and its lowest sentences."""
    text = row[f"{prefix}_caption"]
    scores = {name: row.get(f"{prefix}_{name}") for name in [*_SCORES, *_CHECKED]}
    lowest = {scorer: row.get(f"{prefix}_{scorer}_lowest") for scorer in ("clip", "itm", "vlm")}
    return ScoredCaption(
        SERIES[prefix],
        cut(text),
        ", ".join(f"{name} {shown_value(score)}" for name, score in scores.items() if score is not None),
        {
            scorer: _sentence(text, index, row[f"{prefix}_sentences"])
            for scorer, index in lowest.items()
            if isinstance(index, int)  # a joined column may be anything
        },
    )


def _sentence(caption: str, index: int, count: int | None) -> str:
    """A sentence of a caption by index; only its number if ``count`` shows that the caption was split differently."""
    sentences = split_sentences(caption)
    if len(sentences) != count or not 0 <= index < len(sentences):
        return f"sentence {index + 1} of {count if count is not None else 'an unknown number'}"
    return f"“{cut(sentences[index])}”"
