"""Statistics of a dataset card: one pass over all listings, in constant memory."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...manifests.schema import SELECT
from ...manifests.status import Status
from .source import caption_of

EXAMPLES = 3
_BARS = 12  # rows of a histogram
_BAR = 24  # characters of the longest bar
_FARTHEST = 10_000  # bins from zero on: wider ones take the place of more


@dataclass
class Tally:
    """Histogram with bins of ``width``: exact for word counts, to a hundredth for scores, coarser for large numbers."""

    width: float
    bins: Counter[int] = field(default_factory=Counter)
    total: float = 0.0

    def add(self, value: float) -> None:
        self.bins[math.floor(value / self.width + 1e-4)] += 1  # 0.39 is 0.38999999 as a 32-bit float
        self.total += value

    def widen(self) -> None:
        """Make every ten bins one."""
        before, self.bins, self.width = self.bins, Counter(), self.width * 10
        for bin_, count in before.items():
            self.bins[bin_ // 10] += count

    @property
    def count(self) -> int:
        return self.bins.total()

    @property
    def mean(self) -> float:
        return self.total / self.count

    def quantile(self, share: float) -> float:
        """Lower edge of the bin with the quantile ``share`` (0 to 1); needs at least one value."""
        left = share * (self.count - 1)
        for bin_, count in sorted(self.bins.items()):
            left -= count
            if left < 0:
                return bin_ * self.width
        return max(self.bins) * self.width


@dataclass
class Column:
    """Histograms of a numeric column with the same bins, separately for kept and other rows."""

    kept: Tally
    others: Tally

    @classmethod
    def of(cls, width: float) -> Column:
        return cls(Tally(width), Tally(width))

    def add(self, value: float, kept: bool) -> None:
        """Count a finite number. Its size decides the bins: columns of users are of any unit."""
        while abs(value) / self.kept.width > _FARTHEST:
            self.kept.widen()
            self.others.widen()
        (self.kept if kept else self.others).add(value)


@dataclass
class Statistics:
    """All statistics. ``words``: word counts of the kept rows' captions; ``scores``: by column."""

    statuses: Counter[str] = field(default_factory=Counter)
    words: Tally = field(default_factory=lambda: Tally(1.0))
    without_caption: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    scores: dict[str, Column] = field(default_factory=dict)
    _smallest: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def examples(self) -> list[tuple[str, str]]:
        """Example pairs as (key, caption), those with the smallest uids: independent of the order of shards."""
        return [(key, caption) for _, key, caption in sorted(self._smallest, reverse=True)]

    @property
    def pairs(self) -> int:
        return self.statuses[Status.OK]

    def add(self, parquet: pq.ParquetFile) -> None:
        """Count one shard's listing."""
        scores = [field.name for field in parquet.schema_arrow if _is_score(field, parquet.schema_arrow)]
        texts = [name for name in _TEXTS if name in parquet.schema_arrow.names]
        for name in scores:
            self.scores.setdefault(name, Column.of(0.01))
        for batch in parquet.iter_batches(1000, columns=["key", "uid", "status", *texts, *scores], use_threads=False):
            for row in batch.to_pylist():
                self._add_row(row, scores)

    def _add_row(self, row: Mapping[str, Any], scores: Iterable[str]) -> None:
        kept = row["status"] == Status.OK
        self.statuses[row["status"]] += 1
        for name in scores:
            value = row[name]
            if value is not None and math.isfinite(value):
                self.scores[name].add(value, kept)
        if not kept:
            return
        caption = caption_of(row)
        self.words.add(len(caption.split()))
        self.without_caption += not caption.strip()
        language = _language(row, caption)
        if language:
            self.languages[language] += 1
        if caption.strip():
            entry = (-int(row["uid"], 16), row["key"], caption)
            push = heapq.heappush if len(self._smallest) < EXAMPLES else heapq.heappushpop
            push(self._smallest, entry)


_TEXTS = ("caption", "captions", "text", "re_caption", "re_language", "org_language")


def _is_score(field: pa.Field, schema: pa.Schema) -> bool:
    """True for floats, and for integers that were joined to a selection: its own ones count words and sentences."""
    if pa.types.is_integer(field.type):
        return "source_shard" in schema.names and field.name not in SELECT.names
    return bool(pa.types.is_floating(field.type))


def _language(row: Mapping[str, Any], caption: str) -> str | None:
    """ISO 639-1 code of the caption, if the scores have it."""
    prefix = "re" if caption == row.get("re_caption") else "org"
    return row.get(f"{prefix}_language")


def histogram(column: Column) -> list[tuple[float, float, int, int]]:
    """At most a dozen equal steps over the range of the bins: (from, to, kept, others). Needs at least one value."""
    used = [*column.kept.bins, *column.others.bins]
    low, high, width = min(used), max(used), column.kept.width
    step = -(-(high - low + 1) // _BARS)
    rows = []
    for start in range(low, high + 1, step):
        inside = range(start, start + step)
        kept, others = (sum(t.bins[b] for b in inside) for t in (column.kept, column.others))
        rows.append((start * width, (start + step) * width, kept, others))
    return rows


def bars(counts: Sequence[int]) -> list[str]:
    """Counts as text bars, scaled to the largest; every non-zero count has at least one block."""
    most = max(counts, default=0) or 1
    return ["█" * (max(1, round(_BAR * count / most)) if count else 0) for count in counts]
