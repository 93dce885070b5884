"""Columns of a shard's sidecars, read for the decision about its rows: of scores, marks and joined sources."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ....errors import ArtifactMismatch, BadInput
from ....manifests.expressions.conditions import Mask
from ....manifests.files.store_errors import StoreUnavailable
from ....manifests.joining.columns import joined_values
from ....manifests.joining.companion import Companion
from ....manifests.schema import BASE, SCORE, check
from ....manifests.shards import InputShard
from ....manifests.status import Status
from ....stages.filter.joined import Source
from ....stages.filter.marked import MARKS
from ....stages.filter.select import MARK_TYPES, Rule

SCORES = "scores"  # name of the main scores in a row's ``beside``
IDENTITY = ["key", "uid"]
BASE_SCHEMA = pa.schema(BASE)


@dataclass(frozen=True)
class ShardColumns:
    """Columns of one input shard. ``marks``: statuses in the marks, if there are any.

    ``withdrawn``: rows of images that are withdrawn in a joined source; ``missing``: by source, rows without a value.
    """

    table: pa.Table
    marks: list[str] | None
    withdrawn: Mask
    missing: dict[str, Mask]


def read_shard(
    shard: InputShard,
    columns: Sequence[str],
    mark_columns: Sequence[str] = (),
    sources: Sequence[Source] = (),
) -> ShardColumns:
    """Key, uid and ``columns`` of a shard's scores, ``mark_columns`` of its marks, and all columns of its sources.

    Raises BadInput if a sidecar is of other rows, ArtifactMismatch if one cannot be read.
    """
    table = read_columns(companion_of(shard, SCORES), SCORE, [*IDENTITY, *columns])
    marks = next((companion for companion in shard.companions if companion.name == MARKS), None)
    statuses = None
    if marks is not None:
        listed = read_columns(marks, BASE_SCHEMA, [*IDENTITY, "status"])
        if not same_images(table, listed):
            text = f"{marks.url}: its rows are not those of {companion_of(shard, SCORES).url}, by key and uid"
            raise BadInput(f"{text}; give --marks what was made of these shards")
        statuses = listed.column("status").to_pylist()
    withdrawn, missing = np.zeros(len(table), bool), {}
    for source in sources:
        table, gone, missing[source.name] = _joined(table, shard, source)
        withdrawn |= gone
    return ShardColumns(with_marks(table, shard, mark_columns), statuses, withdrawn, missing)


def deciding_columns(shard: InputShard, rule: Rule, sources: Sequence[Source]) -> pa.Table:
    """The columns by which ``rule`` decides about the rows of a shard, for its condition."""
    table = read_columns(companion_of(shard, SCORES), SCORE, [*IDENTITY, *rule.columns])
    used = {column.name for column in (rule.keep.columns if rule.keep else ())}
    for source in sources:
        if used & source.columns.keys():
            table, _, _ = _joined(table, shard, source, used)
    return with_marks(table, shard, rule.mark_columns)


def companion_of(shard: InputShard, name: str) -> Companion:
    return next(companion for companion in shard.companions if companion.name == name)


def _joined(
    scores: pa.Table, shard: InputShard, source: Source, wanted: Collection[str] | None = None
) -> tuple[pa.Table, Mask, Mask]:
    """Scores with columns of a source, all or the ``wanted`` ones; its withdrawn rows; rows where all are null."""
    companion = companion_of(shard, source.name)
    names = {name: column for name, column in source.columns.items() if wanted is None or name in wanted}
    schema = pa.schema([*BASE, *(pa.field(column, source.types[column]) for column in dict.fromkeys(names.values()))])
    table = read_columns(companion, schema, [*IDENTITY, "status", *names.values()])
    if not same_images(scores, table):
        text = f"{companion.url}: its rows are not those of {companion_of(shard, SCORES).url}, by key and uid"
        raise BadInput(f"{text}; give --scores what was made of these shards")
    missing = np.ones(len(table), bool)
    for name, column in names.items():
        values = joined_values(table.column(column))
        missing &= np.array(values.is_null(), dtype=bool)
        position = scores.schema.get_field_index(name)
        scores = scores.append_column(name, values) if position < 0 else scores.set_column(position, name, values)
    return scores, np.array(pc.equal(table.column("status"), str(Status.WITHDRAWN)), dtype=bool), missing


def with_marks(scores: pa.Table, shard: InputShard, columns: Sequence[str]) -> pa.Table:
    """Scores with columns of the shard's marks. Raises BadInput if it has no marks, or if they have no such column."""
    if not columns:
        return scores
    marks = next((companion for companion in shard.companions if companion.name == MARKS), None)
    if marks is None:
        raise BadInput(f"--keep: {columns[0]} is a column of the marks of `capipe dedup`; name them with --marks")
    try:
        table = read_columns(marks, pa.schema([(name, MARK_TYPES[name]) for name in columns]), columns)
    except ArtifactMismatch as error:
        hint = "; `capipe dedup` writes it with --texts or --captions" if columns[0].startswith("text_") else ""
        raise BadInput(f"--keep: {error}{hint}") from None
    for name in columns:
        scores = scores.append_column(name, table.column(name))
    return scores


def same_images(one: pa.Table, other: pa.Table) -> bool:
    return all(one.column(name).equals(other.column(name)) for name in IDENTITY)


def read_columns(companion: Companion, schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """Some columns of a sidecar, after a check of its schema. Its checksum, which needs all columns, is not checked."""
    try:
        with companion.open() as parquet:
            check(parquet.schema_arrow, schema, companion.url)
            return companion.table(parquet, list(dict.fromkeys(columns)))
    except StoreUnavailable:
        raise
    except (OSError, pa.ArrowException) as error:
        text = f"{companion.url}: cannot be read ({error}); restore it, or run its stage again with --fresh"
        raise ArtifactMismatch(text) from None
