"""Planning of a selection from the columns of the scores: no image is opened, no model loaded.

Only the columns needed for the decision are loaded, one input shard at a time. Memory with ``top``: the score of each
eligible row, 4 bytes (8 for a column of integers), twice that while the threshold is computed. Without ``top``: a count
for each shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.filesize import decimal

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.expressions.parser import kind_of, shown_value
from ...manifests.files.stores import filesystem
from ...manifests.joining.companion import Companion
from ...manifests.manifest import ShardRecord
from ...manifests.shards import InputShard
from ...manifests.status import Status
from ...manifests.withdrawal.uid_set import EMPTY, UidSet
from ...stages.filter.joined import Source
from ...stages.filter.select import (
    MARK_TYPES,
    NO_TEXT,
    Decision,
    Rule,
    Scores,
    SelectConfig,
    Text,
    decide,
    scores_of,
    top_threshold,
)
from .joined.columns import (
    BASE_SCHEMA,
    IDENTITY,
    SCORES,
    ShardColumns,
    companion_of,
    read_columns,
    read_shard,
    same_images,
)

_NEW = "re_length"  # column that is null without a new caption


@dataclass(frozen=True)
class ShardPlan:
    """``kept``: number of kept rows of each input shard under ``rule``; the other counts are over all shards.

    ``eligible``: candidates that satisfy `keep` and that `top` can rank. ``missing``: by label of a joined source, the
    candidates without any value of it.
    """

    rule: Rule
    kept: list[int]
    sizes: list[int]
    candidates: int
    eligible: int
    missing: Mapping[str, int] = field(default_factory=dict)

    def line(self) -> str:
        rule = self.rule
        threshold = f", threshold {rule.config.by} >= {rule.threshold_text}" if rule.by else ""
        counts = f"{sum(self.kept):,} of {self.candidates:,} candidates are kept"
        return f"select ({rule.config.shown}): {counts}, {sum(self.sizes):,} rows in all{threshold}"

    def as_json(self) -> dict[str, Any]:
        """Everything but the options."""
        decided = {"text": self.rule.text, "threshold": self.rule.threshold_text}
        return {**{name: value for name, value in vars(self).items() if name != "rule"}, **decided}

    @classmethod
    def of_json(cls, config: SelectConfig, plan: Mapping[str, Any]) -> ShardPlan:
        """The plan with these options of which ``plan`` is :meth:`as_json`."""
        counts = {name: value for name, value in plan.items() if name not in ("text", "threshold")}
        return cls(Rule.of(config, plan["text"], plan["threshold"]), **counts)

    def missing_lines(self) -> list[str]:
        """For each joined source that has not a value of every candidate, how many it has none of."""
        return [
            f"{label}: has no value of {count:,} of {self.candidates:,} candidates; no condition on one is true of them"
            for label, count in self.missing.items()
            if count
        ]

    def warning(self) -> str | None:
        """A one-line warning if the conditions filter nothing out."""
        asked = self.rule.config
        if (asked.keep is None and asked.top is None) or sum(self.kept) < self.candidates:
            return None
        return f"{asked.shown}: keeps all {self.candidates:,} candidates; raise the threshold to sort some out"


@dataclass(frozen=True)
class SelectCosts:
    """Estimated bytes of a selection: ``images`` of the kept rows, if copied, and ``rows``, which an index has, too."""

    images: int
    rows: int

    def line(self) -> str:
        images, rows = decimal(self.images), decimal(self.rows)
        return f"to write: about {images} of images and {rows} of rows; with --index the rows alone"


#: Size of a selection's Parquet relative to that of its scores, with a few more columns; bench/stages/index.py
ROWS_TO_SCORES = 1.3


def costs(shards: Sequence[InputShard], scores: Artifact, plan: ShardPlan) -> SelectCosts:
    """Estimate from manifests alone: an image is as large as others of its shard."""
    scored, images, rows = scores.committed(), 0.0, 0
    for shard, kept, size in zip(shards, plan.kept, plan.sizes, strict=True):
        record = scored[shard.name]
        tar = shard.record.files[f"{shard.name}.tar"] if shard.record is not None else record.input
        samples = shard.record.rows.get(Status.OK, 0) if shard.record is not None else size
        images += int(tar.get("bytes") or 0) * kept / max(1, samples)
        rows += int(record.files[f"{shard.name}.parquet"]["bytes"])
    return SelectCosts(round(images), round(rows * ROWS_TO_SCORES))


def plan_shards(
    shards: Sequence[InputShard],
    scores: Artifact,
    config: SelectConfig,
    uids: UidSet = EMPTY,
    threshold: str | None = None,
    sources: Sequence[Source] = (),
) -> ShardPlan:
    """Decide about all rows of ``shards``, each joined with its scores, other ``sources`` of columns, and marks.

    ``uids``: withdrawn images; ``threshold``: that of ``top``, if it was decided before.
    Raises BadInput if the scores are of other images, or if nothing would be kept.
    """
    committed = scores.committed()
    texts: tuple[Text, ...] = ("org", "re") if config.text == "auto" else (config.text,)
    for text in texts:  # one pass, from the first new caption on another
        org_alone = text == "org" and len(texts) > 1
        counts = _counted(shards, Rule.of(config, text), committed, uids, org_alone, sources)
        if counts is not None:
            break
    assert counts is not None
    rule, kept = counts.rule, counts.eligible
    if not sum(kept):
        raise _nothing(shards, rule, uids, sources)
    if config.top is not None:
        values = np.concatenate(counts.ranked)
        counts.ranked.clear()
        if threshold is None:
            rule = replace(rule, threshold=top_threshold(values, config.top))
        else:
            rule = Rule.of(config, rule.text, threshold)
        above = values >= rule.precision(rule.threshold or 0.0)
        kept = [int(part.sum()) for part in np.split(above, np.cumsum(counts.eligible)[:-1])]
    missing = {source.label: counts.missing[source.name] for source in sources}
    return ShardPlan(rule, kept, counts.sizes, counts.candidates, sum(counts.eligible), missing)


@dataclass(frozen=True)
class _Counts:
    """What a pass over the scores found; ``eligible`` and ``sizes`` by shard, ``ranked``: the scores of `top`.

    ``missing``: by joined source, candidates without a value of it.
    """

    rule: Rule
    eligible: list[int]
    sizes: list[int]
    ranked: list[Scores]
    candidates: int
    missing: Mapping[str, int]


def _counted(
    shards: Sequence[InputShard],
    rule: Rule,
    committed: Mapping[str, ShardRecord],
    uids: UidSet,
    org_alone: bool,
    sources: Sequence[Source],
) -> _Counts | None:
    """Read the scores once; None if there is a new caption, where there were to be original ones alone."""
    eligible, sizes, ranked, candidates = [], [], [], 0
    missing: Counter[str] = Counter()
    for shard in shards:
        seen = read_shard(shard, [*rule.columns, _NEW], rule.mark_columns, sources)
        table = seen.table
        if org_alone and table.column(_NEW).null_count < len(table):
            return None
        _check_images(shard, table, committed[shard.name].input.get("bytes"))
        decision = _decided(seen, rule, uids)
        sizes.append(len(table))
        candidates += int(decision.candidate.sum())
        missing.update({name: int((decision.candidate & rows).sum()) for name, rows in seen.missing.items()})
        eligible.append(int(decision.eligible.sum()))
        if decision.by is not None:
            ranked.append(decision.by[decision.eligible])
    return _Counts(rule, eligible, sizes, ranked, candidates, missing)


def _decided(seen: ShardColumns, rule: Rule, uids: UidSet) -> Decision:
    return decide(seen.table, seen.marks, rule, uids.mask(seen.table.column("uid")) | seen.withdrawn)


def _check_images(shard: InputShard, table: pa.Table, scored_bytes: int | None) -> None:
    """Raise BadInput unless the scores are of this shard's images: by key and uid if a Parquet lists them, else by the
    tar's size (then each row is compared when its image is read)."""
    scores = companion_of(shard, SCORES).url
    hint = "give --shards those that were scored, or score these"
    if shard.record is None:
        fs, path = filesystem(shard.url)
        if scored_bytes is not None and fs.size(path) != scored_bytes:
            raise BadInput(f"{scores}: made of another tar than {shard.url} (its size differs); {hint}")
        return
    url = shard.url.removesuffix(".tar") + ".parquet"
    listed = read_columns(Companion("images", url, "", shard.record.count), BASE_SCHEMA, IDENTITY)
    if same_images(table, listed):
        return
    where = f"{len(table)} rows, {len(listed)} there"
    for index, (ours, theirs) in enumerate(zip(table.to_pylist(), listed.to_pylist(), strict=False)):
        if (ours["key"], ours["uid"]) != (theirs["key"], theirs["uid"]):
            where = f"row {index}, {ours['key']!r}, is another image than {theirs['key']!r} there"
            break
    raise BadInput(f"{scores}: its rows are not those of {shard.url}, by key and uid ({where}); {hint}")


def _nothing(shards: Sequence[InputShard], rule: Rule, uids: UidSet, sources: Sequence[Source]) -> BadInput:
    """The error if no row is kept: shows the values of the candidates' columns, which are read again for it."""
    named = {column.name: column.shown for column in (rule.keep.columns if rule.keep else ())}
    if rule.by is not None:
        named.setdefault(rule.by, rule.config.by)

    def gather(of: Callable[[Decision], Any], name: str) -> Iterator[pa.ChunkedArray]:
        marked = name in MARK_TYPES and name not in rule.config.columns
        columns = [*rule.columns, *([] if marked or name in rule.config.columns else [name])]
        mark_columns = list(dict.fromkeys([*rule.mark_columns, *([name] if marked else [])]))
        for shard in shards:
            seen = read_shard(shard, columns, mark_columns, sources)
            yield seen.table.column(name).filter(pa.array(of(_decided(seen, rule, uids))))

    statuses = Counter(status for part in gather(lambda d: ~d.candidate, "status") for status in part.to_pylist())
    candidates = sum(len(part) for part in gather(lambda d: d.candidate, "status"))
    if not candidates:
        left = ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items())) or "none at all"
        what = "an image" if rule.text == NO_TEXT else f"a {rule.text}_caption to write"
        text = f"no row has {what} and is not marked (rows by status: {left})"
        return BadInput(f"{shards[0].companions[0].url} and the rest: {text}; nothing can be kept")
    ranges = "; ".join(f"{shown} {_range(list(gather(lambda d: d.candidate, name)))}" for name, shown in named.items())
    return BadInput(f"{rule.config.shown}: keeps none of {candidates:,} candidates; among them {ranges}")


def _range(parts: list[pa.ChunkedArray]) -> str:
    """Description of a column's values."""
    column = pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)
    if kind_of(column.type) != "number":
        common = Counter(str(value) for value in column.to_pylist() if value is not None).most_common(3)
        listed = ", ".join(f"{shown_value(value)} ({count:,} times)" for value, count in common)
        return f"is mostly {listed}" if listed else "is always missing"
    values = scores_of(pa.table({"x": column}), "x")
    values = values[~np.isnan(values)]
    if not len(values):
        return "is always missing"
    low, middle, high = (shown_value(float(value)) for value in (values.min(), np.median(values), values.max()))
    missing = f", {len(column) - len(values):,} missing" if len(values) < len(column) else ""
    return f"is from {low} to {high} (median {middle}{missing})"


def ok_uids(artifact: Artifact) -> Iterator[str]:
    """Uids of a committed artifact's kept rows, in order."""
    for shard in artifact.committed():
        table = artifact.table(shard, ["uid", "status"])
        yield from table.filter(pc.equal(table.column("status"), str(Status.OK))).column("uid").to_pylist()
