"""Selection of scored rows for the final shards, and the contents of these. Pure functions without file access.

A row is a candidate if its scores are ok, no dedup mark excludes it and it has a caption. A candidate is kept if
``keep`` holds and, with ``top``, its score is in the top fraction of the candidates for which ``keep`` holds and which
have a score. Every row is written out, rejected ones with their scores and the reason.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict, Field, model_validator

from ...errors import BadInput
from ...manifests.configuration import Growing
from ...manifests.expressions.conditions import Mask
from ...manifests.expressions.parser import (
    Expression,
    UnknownColumn,
    kind_of,
    parse,
    shortest,
    shown_value,
    unknown_column,
)
from ...manifests.joining.columns import TYPES as JOINED_TYPES
from ...manifests.schema import DEDUP, SCORE, SELECT, TEXT_MARKS
from ...manifests.shards import Row
from ...manifests.sidecars import encode_meta
from ...manifests.status import Status
from ...models.images.formats import Header, read_header
from .joined import SHARED, joined_aliases
from .marked import marked_status, standing

STAGE = "select"
Text = Literal["re", "org", "none"]
NO_TEXT: Text = "none"  # images are selected, whether or not they have captions, and none is written
Scores = npt.NDArray[np.floating[Any]]

_TYPES: dict[str, pa.DataType] = {field.name: field.type for field in SCORE}
#: Columns of dedup marks, by which rows may be kept, too.
MARK_TYPES: dict[str, pa.DataType] = {
    field.name: field.type for field in (*DEDUP, *TEXT_MARKS) if field.name not in _TYPES
}
#: Columns of a row that are not in its sample's JSON: they are in the tar otherwise, or of no use to a loader.
_NOT_IN_JSON = frozenset({"key", "status", "error", "caption", "source_shard", "source_key"})


def aliases(text: Text, joined: Collection[str] = ()) -> dict[str, str]:
    """Unprefixed column names, mapped to those of the caption that is written; also of ``joined`` columns.

    If none is written, they are the original one's.
    """
    prefix = "org" if text == NO_TEXT else text
    return {name: f"{prefix}_{name}" for name in SHARED} | joined_aliases(joined, prefix)


class SelectConfig(Growing):
    """Options of selection and packing; all of them are in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later = ("index", "columns")

    keep: str | None = Field(
        None, description="condition over the columns of scores and marks; see manifests/expressions/parser.py"
    )
    top: float | None = Field(None, gt=0, le=1, description="fraction to keep of the candidates that `keep` leaves")
    by: str = Field("clip_score", description="column by which `top` ranks")
    shard_size: int = Field(10_000, ge=1, description="kept rows per final shard; a single input shard may have more")
    text: Literal["auto", "re", "org", "none"] = Field(
        "auto",
        description="the caption to write: new, original, none; auto takes the new ones where the scores have any",
    )
    index: bool = Field(False, description="write no tars: rows alone, over the original ones")
    columns: dict[str, str] = Field({}, description="columns joined to those of the scores, with their Arrow types")

    @model_validator(mode="after")
    def _names_known_columns(self) -> SelectConfig:
        """Raises UnknownColumn for an unknown name in `keep` or `by`, BadInput for anything else that is wrong."""
        if unusable := [kind for kind in self.columns.values() if kind not in JOINED_TYPES]:
            raise BadInput(f"columns: no type of a joined column is called {unusable[0]!r}")
        if self.keep is not None:
            parse(self.keep, self.types, aliases("re", self.columns))
        names = {**_TYPES, **self.joined_types}
        column = aliases("re", self.columns).get(self.by, self.by)
        if column not in names:
            known = [*aliases("re", self.columns), *names]
            raise UnknownColumn(f"--by {self.by}: {unknown_column(self.by, known)}")
        if kind_of(names[column]) != "number":
            raise BadInput(f"--by {self.by}: not a number; name a column of scores")
        return self

    @property
    def joined_types(self) -> dict[str, pa.DataType]:
        """Arrow types of the joined columns."""
        return {name: JOINED_TYPES[kind] for name, kind in self.columns.items()}

    @property
    def joined_numbers(self) -> list[str]:
        """Joined columns that are numbers."""
        return [name for name, kind in self.joined_types.items() if kind_of(kind) == "number"]

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Columns that a condition may name, without their shorter names: of scores and marks, and joined ones."""
        return {**_TYPES, **MARK_TYPES, **self.joined_types}

    @property
    def shown(self) -> str:
        """The conditions as command-line options."""
        top = "" if self.top is None else f"--top {self.top:g} --by {self.by}"
        return " ".join(part for part in ("" if self.keep is None else f"--keep {self.keep!r}", top) if part) or "all"


@dataclass(frozen=True)
class Rule:
    """A resolved config. ``text``: the caption to write; ``threshold``: minimum score for ``top``, once known."""

    config: SelectConfig
    text: Text
    keep: Expression | None
    threshold: float | None = None

    @classmethod
    def of(cls, config: SelectConfig, text: Text, threshold: str | None = None) -> Rule:
        """Rule of a config; ``threshold`` as in :attr:`threshold_text`."""
        keep = None if config.keep is None else parse(config.keep, config.types, aliases(text, config.columns))
        rule = cls(config, text, keep)
        return rule if threshold is None else replace(rule, threshold=float(rule.precision(threshold)))

    def precision(self, number: float | str) -> np.floating[Any]:
        """Cast a number to the precision of the column that ``top`` ranks by."""
        single = self.by is not None and pa.types.is_float32(self.config.types[self.by])
        return np.float32(number) if single else np.float64(number)

    @property
    def threshold_text(self) -> str | None:
        """Shortest decimal of the threshold that round-trips exactly."""
        return None if self.threshold is None else str(self.precision(self.threshold))

    @property
    def by(self) -> str | None:
        """Column by which ``top`` ranks; None without ``top``."""
        asked = self.config
        return None if asked.top is None else aliases(self.text, asked.columns).get(asked.by, asked.by)

    @property
    def columns(self) -> list[str]:
        """Columns of the scores needed for the decision."""
        used: dict[str, None] = dict.fromkeys(["status", *self._caption_length])
        used |= dict.fromkeys([*self._kept_by, *([self.by] if self.by else [])])
        return [name for name in used if name in _TYPES and name not in self.config.columns]

    @property
    def _caption_length(self) -> list[str]:
        return [] if self.text == NO_TEXT else [f"{self.text}_length"]

    @property
    def mark_columns(self) -> list[str]:
        """Columns of the marks needed for it, beside their status."""
        return [name for name in self._kept_by if name in MARK_TYPES and name not in self.config.columns]

    @property
    def _kept_by(self) -> list[str]:
        return [column.name for column in (self.keep.columns if self.keep else ())]

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of the final shards: joined ones at the end."""
        return pa.schema([*SELECT, *(pa.field(*column) for column in self.config.joined_types.items())])

    def bounds(self) -> list[tuple[str, float]]:
        """Columns and the numbers that they are compared with, for plots."""
        bounds = self.keep.bounds() if self.keep else []
        return bounds if self.by is None or self.threshold is None else [*bounds, (self.by, self.threshold)]


@dataclass(frozen=True)
class Decision:
    """Per-row decision before the threshold of ``top`` is known. ``failed``: index of the first term of ``keep`` that
    fails, else -1. ``by``: score that ``top`` ranks by, NaN if missing."""

    candidate: Mask
    failed: npt.NDArray[np.int32]
    by: Scores | None

    @property
    def eligible(self) -> Mask:
        """Rows that are kept before ``top``, without those that it cannot rank."""
        mask: Mask = self.candidate & (self.failed < 0)
        return mask if self.by is None else mask & ~np.isnan(self.by)

    def kept(self, rule: Rule) -> Mask:
        """Rows that are kept under the rule's threshold, ties included."""
        if self.by is None:
            return self.eligible
        assert rule.threshold is not None
        mask: Mask = self.eligible & (self.by >= rule.precision(rule.threshold))
        return mask


def decide(table: pa.Table, marks: Sequence[str] | None, rule: Rule, withdrawn: Mask | None = None) -> Decision:
    """Decide on the rows of ``table``, which has at least :attr:`Rule.columns` and :attr:`Rule.mark_columns`;
    ``marks``: dedup statuses, if any; ``withdrawn``: rows of withdrawn images."""
    usable = [str(status) for status in (Status.OK, Status.EMPTY) if _usable(status, rule)]
    candidate = _where(pc.is_in(table.column("status"), value_set=pa.array(usable)))
    if rule.text != NO_TEXT:
        candidate &= _where(pc.greater(table.column(f"{rule.text}_length"), 0))
    if marks is not None:
        candidate &= standing(marks)
    if withdrawn is not None:
        candidate &= ~withdrawn
    keep = rule.keep
    failed = np.full(len(table), -1, np.int32) if keep is None else keep.failures(table)
    return Decision(candidate, failed, None if rule.by is None else scores_of(table, rule.by))


def _usable(status: str, rule: Rule) -> bool:
    """True for a scored row that may be kept: without a caption only if none is written."""
    return status == Status.OK or (status == Status.EMPTY and rule.text == NO_TEXT)


def _where(column: pa.ChunkedArray) -> Mask:
    mask: Mask = pc.fill_null(column, False).combine_chunks().to_numpy(zero_copy_only=False)
    return mask


def scores_of(table: pa.Table, name: str) -> Scores:
    """A numeric column with NaN for null: floats unchanged, integers as float64."""
    column = table.column(name)
    if pa.types.is_integer(column.type):
        column = column.cast(pa.float64(), safe=False)
    scores: Scores = column.combine_chunks().to_numpy(zero_copy_only=False)
    return scores


def top_threshold(scores: Scores, top: float) -> float:
    """Lowest score in the top fraction ``top`` of ``scores``, rounded up to whole rows; needs scores, without NaN.

    It is one of the scores, so it is exact. Ties are kept, so the kept fraction may exceed ``top``.
    """
    count = math.ceil(Fraction(repr(top)) * len(scores))  # 0.07 of 100 rows is 7, not 8
    index = len(scores) - count
    return float(np.partition(scores, index)[index])


def group(kept: Sequence[int], size: int) -> list[range]:
    """Group consecutive input shards, given their numbers of ``kept`` rows, into runs of at most ``size`` kept rows.

    A shard with more is a group of its own. Every group has kept rows, unless there are none at all.
    """
    groups, start, total = [], 0, 0
    for index, count in enumerate(kept):
        if total and count and total + count > size:
            groups.append(range(start, index))
            start, total = index, 0
        total += count
    return [*groups, range(start, len(kept))] if len(kept) else []


def final_keys(shards: Sequence[str], keys: Sequence[Sequence[str]]) -> list[list[str]]:
    """Keys of a final shard merged from ``shards``: unchanged, unless two rows of different shards share one.

    In that case all are prefixed with their shard's name; if that still leaves duplicates, also with its number.
    """
    prefixes = ([""] * len(shards), [f"{_plain(shard)}_" for shard in shards])
    numbered = [f"{number:05d}_{prefix}" for number, prefix in enumerate(prefixes[1])]
    for chosen in (*prefixes, numbered):
        named = [[prefix + key for key in own] for prefix, own in zip(chosen, keys, strict=True)]
        if len({key for own in named for key in own}) == sum(map(len, named)):
            break
    return named


def _plain(shard: str) -> str:
    """A shard's name without dots, which end a key, and slashes."""
    return shard.replace(".", "_").replace("/", "_")


def selection_status(
    row: Mapping[str, Any], mark: Mapping[str, Any] | None, rule: Rule, failed: int
) -> tuple[str, str | None]:
    """Status and error of a scored row, by the same rule as :func:`decide`, which gives ``failed``."""
    own, note = row["status"], row["error"]
    if own != Status.OK and _usable(own, rule):
        own, note = str(Status.OK), None
    status, error = marked_status(own, note, mark)
    reason = _rejected({**(mark or {}), **row}, rule, failed) if status == Status.OK else None
    if reason is None:
        return status, error
    return str(Status.FILTERED), "; ".join(part for part in (reason, note) if part)


def _rejected(row: Mapping[str, Any], rule: Rule, failed: int) -> str | None:
    if rule.text != NO_TEXT and not row[f"{rule.text}_length"]:
        return f"{rule.text}_caption is missing: there is nothing to write"
    if failed >= 0 and rule.keep is not None:
        return rule.keep.reason(failed, row)
    if rule.by is None or rule.threshold is None:
        return None
    value, asked = row[rule.by], rule.config
    if value is not None and value >= rule.threshold:
        return None
    return f"{asked.by} >= {rule.threshold_text} (top {asked.top:g}): {asked.by} is {shown_value(value)}"


def final_row(
    row: Mapping[str, Any], status: str, error: str | None, key: str, shard: str, text: Text
) -> dict[str, Any]:
    """Row of the final shards from a scored row. ``caption`` is set if the row is ok, unless none is written."""
    caption = row[f"{text}_caption"] if status == Status.OK and text != NO_TEXT else None
    own = {"key": key, "status": status, "error": error, "caption": caption}
    return {**row, **own, "source_shard": shard, "source_key": row["key"]}


def members(source: Row, row: Mapping[str, Any]) -> dict[str, bytes] | None:
    """Tar members of a final row: unchanged image bytes, the caption, the rest as JSON; None unless it is ok.

    Loaders expect a caption of every sample: if none is written, it is empty.
    """
    if row["status"] != Status.OK or source.image is None:
        return None
    header = read_header(source.image)
    extension = header.format if isinstance(header, Header) else source.format
    ours = {name: _decimal(value) for name, value in row.items() if name not in _NOT_IN_JSON}
    # Without nulls: `datasets` infers a column's type from the first samples, and would infer the null type.
    ours = {name: value for name, value in ours.items() if value is not None and value != []}
    try:
        meta = encode_meta(source.meta or {}, ours)
    except RecursionError:
        meta = encode_meta({}, ours)
    return {extension: source.image, "txt": (row["caption"] or "").encode(), "json": meta}


def _decimal(value: Any) -> Any:
    """A float as its shortest round-trip decimal; None for NaN and infinity, which JSON lacks."""
    if not isinstance(value, float):
        return value
    return float(str(shortest(value))) if math.isfinite(value) else None


def uid_list(uids: Iterable[str]) -> npt.NDArray[np.void]:
    """DataComp's list of samples: distinct uids as two big-endian halves (``u8,u8``), sorted."""
    halves = np.frombuffer(bytes.fromhex("".join(uids)), ">u8").astype("<u8")
    return np.unique(halves.view(np.dtype("u8,u8")))
