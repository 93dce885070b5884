"""Marks by texts, on top of marks by images: groups of near-duplicate captions as columns, and as duplicates if asked.

Only rows that are ok by their images are compared and counted: a copy of an image often has a copy of its text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from ....manifests.artifact import Artifact
from ....manifests.manifest import ShardRecord
from ....manifests.schema import DEDUP, TEXT_MARKS
from ....manifests.status import Status
from ..arrays import Bools, Indices
from ..hash_sets import hash_rows
from .bands import Bands
from .leaders import Leaders, Meetings, group_texts
from .text_set import TextFile, TextSet, read_signatures

COLUMNS = pa.schema([*DEDUP, *TEXT_MARKS])


class TextConfig(BaseModel):
    """Options that determine the marks by texts; all of them are in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_threshold: float = Field(0.8, ge=0.5, le=1, description="Jaccard index from which texts are near-duplicates")
    per_text: int | None = Field(None, ge=1, description="rows of a group that stay; more of them become duplicates")


def find_leaders(texts: TextSet, threshold: float, stopped: Callable[[], bool]) -> Leaders | None:
    """Group all texts; None if ``stopped`` says so. Does not depend on the order of the shards."""
    bands = Bands.of(threshold)
    with tempfile.TemporaryDirectory(prefix="capipe-dedup-") as folder:
        signatures, keys = read_signatures(texts, bands, Path(folder))
        meetings = Meetings.of(keys)
        wanted: Bools = np.zeros(len(texts), dtype=bool)
        wanted[meetings.texts] = True
        with (Path(folder) / "texts").open("w+b") as scratch:
            shingles = TextFile(texts, wanted, scratch)
            return group_texts(texts.priority, meetings, signatures, shingles, threshold, stopped)


@dataclass(frozen=True)
class TextMarks:
    """What is written about each row. ``leaders``: of each text.

    ``group_rows``: rows of each leader's group, ``(texts,)``; ``rank``: of each row in its group, from 1, ``(rows,)``;
    ``firsts``: key of the first row of each group that has more rows than ``per_text``.
    """

    texts: TextSet
    leaders: Leaders
    group_rows: Indices
    rank: Indices
    firsts: Mapping[int, str]
    per_text: int | None

    @classmethod
    def of(cls, texts: TextSet, leaders: Leaders, marks: Artifact, config: TextConfig) -> TextMarks:
        """Rank the rows: those with the leader's text first, then the others by text; of one text by uid."""
        with_text = np.flatnonzero(texts.rows >= 0)
        text = texts.rows[with_text]
        group = leaders.leader[text]
        order = np.lexsort((texts.uids[with_text], text, text != group, group))
        starts = np.flatnonzero(np.diff(group[order], prepend=-1))
        sizes = np.diff(starts, append=len(order))
        rank = np.zeros(len(texts.rows), dtype=np.int64)
        rank[with_text[order]] = np.arange(len(order)) - np.repeat(starts, sizes) + 1
        group_rows = np.bincount(group, minlength=len(texts))
        firsts: dict[int, str] = {}
        if config.per_text is not None:
            named = (rank == 1) & (texts.rows >= 0)
            named[named] = group_rows[leaders.leader[texts.rows[named]]] > config.per_text
            firsts = dict(_keys(texts, leaders, marks, named))
        return cls(texts, leaders, group_rows, rank, firsts, config.per_text)


def _keys(texts: TextSet, leaders: Leaders, marks: Artifact, named: Bools) -> Iterator[tuple[int, str]]:
    """Group and key of the ``named`` rows."""
    for number, shard in enumerate(texts.shards):
        of_shard = texts.rows_of(number)
        chosen = np.flatnonzero(named[of_shard])
        if len(chosen):
            keys = marks.table(shard, ["key"])["key"].take(pa.array(chosen)).to_pylist()
            yield from zip(leaders.leader[texts.rows[of_shard][chosen]].tolist(), keys, strict=True)


def mark_texts(
    number: int,
    base: ShardRecord,
    marks: Artifact,
    found: TextMarks,
    artifact: Artifact,
    by: Mapping[str, Any],
    over: ShardRecord | None = None,
) -> ShardRecord:
    """Write and commit one shard's rows of ``marks`` with marks by texts, replacing older ones (``over``), if any.

    ``number``: of the shard in the text set; ``base``: its record in ``marks``; ``by``: for the manifest.
    """
    texts, rows = found.texts, found.texts.rows_of(number)
    with artifact.begin(base.shard, COLUMNS, over=over) as out:
        marked = hash_rows(marks, base.shard, DEDUP.names)
        for row, text, rank in zip(marked, texts.rows[rows].tolist(), found.rank[rows].tolist(), strict=True):
            out.write({**row, **(_mark(text, rank, found) if text >= 0 else {})})
        digest = str(base.files[f"{base.shard}.parquet"]["sha256"])
        return out.commit(rows_in=base.count, input_info={"digest": digest, **by})


def _mark(text: int, rank: int, found: TextMarks) -> dict[str, Any]:
    leader, similarity = int(found.leaders.leader[text]), float(found.leaders.similarity[text])
    rows = int(found.group_rows[leader])
    out: dict[str, Any] = {
        "text_group": found.texts.digests[leader].ljust(16, b"\0").hex(),
        "text_similarity": similarity,
        "text_copies": int(found.texts.counts[text]),
        "text_rows": rows,
        "text_rank": rank,
    }
    if found.per_text is None or rank <= found.per_text:
        return out
    first = found.firsts[leader]
    how = "the same text as" if text == leader else f"a text like (by {similarity:.2f}) that of"
    error = f"{how} {first}: row {rank} of {rows}, {found.per_text} are kept"
    return {**out, "status": Status.DUPLICATE, "duplicate_of": first, "error": error}
