"""Captions appended to the Lance table of an export: the sets that it has, and the shards that lack some of them.

The configuration notes the sets. A shard's line in the manifest says of which captions its fragment has columns:
captions of which some were done again are written again, and nothing else is.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.manifest import ShardRecord
from ...manifests.status import Status
from ...stages.export.lance.captions import (
    APPENDED,
    CaptionSet,
    append_captions,
    check_columns,
    fitted,
    open_set,
)
from ...stages.export.lance.schema import FORMAT
from ...stages.export.source import committed_listing
from ...stages.export.transcode import schema_of
from ...stages.export.write import ExportConfig
from ..runners.messages import Event, ShardFailed
from ..runners.placement import TaskPlacement
from ..runners.pool_job import local_paths, run_pool_job
from ..runners.shard_queue import JobResult


@dataclass(frozen=True)
class Appending:
    """``given``: captions at hand; ``sets``: facts on all that the table is to have, in the order of its columns."""

    given: tuple[CaptionSet, ...] = ()
    sets: tuple[Mapping[str, Any], ...] = ()

    def lacks(self, record: ShardRecord) -> list[str]:
        """Names of the sets that a shard lacks, or has as they were before."""
        there, at_hand = record.stats.get(APPENDED, {}), {entry.name: entry for entry in self.given}
        names = [str(entry["name"]) for entry in self.sets]
        return [n for n in names if n not in there or (n in at_hand and there[n] != at_hand[n].digest)]

    def todo(self, artifact: Artifact) -> list[ShardRecord]:
        return [record for record in artifact.committed().values() if self.lacks(record)] if self.sets else []


def open_sets(given: Sequence[str], format: str, source: Artifact, shards: Sequence[ShardRecord]) -> list[CaptionSet]:
    """The captions to append. Raises BadInput unless they are of the source's rows, as far as its first shard tells."""
    if not given:
        return []
    if format != FORMAT:
        raise BadInput(f"--append-captions: columns are added to a table; use --format {FORMAT}, or leave it out")
    sets = [open_set(text) for text in given]
    names = [entry.name for entry in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"--append-captions: two sets named {twice}; name them: --append-captions NAME=ARTIFACT")
    first = next((record for record in shards if record.rows.get(Status.OK)), shards[0])
    return [fitted(entry, source, first) for entry in sets]


def require(artifact: Artifact, given: Sequence[CaptionSet], names: Collection[str] | None = None) -> None:
    """Raises BadInput unless captions are given again that shards to be written need: all, or those of these names."""
    needed = {str(entry["name"]) for entry in artifact.config["run"].get(APPENDED, ())} if names is None else {*names}
    if missing := sorted(needed - {entry.name for entry in given}):
        text = f"{artifact.url}: shards are to be written that have columns of the captions {', '.join(missing)}"
        raise BadInput(f"{text}; give these again: --append-captions {missing[0]}=ARTIFACT")


def settle(artifact: Artifact, given: Sequence[CaptionSet], rows: pa.Schema, writes: bool) -> Appending:
    """Note the sets of a locked artifact. ``rows``: schema of its listings; ``writes``: shards are to be written.

    Raises BadInput for a name that other captions have, and if captions are needed that were not given again.
    """
    noted: list[Mapping[str, Any]] = list(artifact.config["run"].get(APPENDED, ()))
    known = {str(entry["name"]): position for position, entry in enumerate(noted)}
    new = [entry for entry in given if entry.name not in known]
    sets = [*noted, *(entry.facts for entry in new)]
    for entry in given:
        if entry not in new and noted[known[entry.name]]["fingerprint"] != entry.artifact.fingerprint:
            _refuse_complete(artifact, entry)
            sets[known[entry.name]] = entry.facts
    appending = Appending(tuple(given), tuple(sets))
    check_columns(rows, appending.sets)
    if new and artifact.shared and artifact.committed():
        text = f"{artifact.url}: other processes may be adding shards without these captions"
        raise BadInput(f"{text}; run the command once without --share")
    lacking = {name for record in appending.todo(artifact) for name in appending.lacks(record)}
    require(artifact, given, {*known} if writes else lacking)
    if sets != noted:
        artifact.note(**{APPENDED: sets})
    return appending


def _refuse_complete(artifact: Artifact, other: CaptionSet) -> None:
    """Raises BadInput if all shards have columns of a name that other captions are to have."""
    if all(other.name in record.stats.get(APPENDED, {}) for record in artifact.committed().values()):
        text = f"{artifact.url}: has columns of other captions under the name {other.name}"
        raise BadInput(f"{text}; name these otherwise: --append-captions NAME={other.artifact.url}")


def listing_schema(source: Artifact, record: ShardRecord, config: ExportConfig) -> pa.Schema:
    """Columns of the listings of an export of ``source``."""
    with committed_listing(source, record) as listed:
        return listed.schema_arrow if config.transcode is None else schema_of(listed.schema_arrow)


def execute_appending(
    appending: Appending,
    artifact: Artifact,
    placement: TaskPlacement,
    report: Callable[[Event], None],
    stop: threading.Event,
) -> JobResult:
    """Add the columns that shards lack; returns when all are committed or quarantined, or ``stop`` is set."""
    write = functools.partial(_write, appending=appending)
    records = appending.todo(artifact)
    return run_pool_job(
        *(records, write, artifact, placement.at_most(len(records)), lambda event: _pass_failures(event, report), stop),
        shard_name=lambda record: record.shard,
        over=lambda record: [record],
        reads=local_paths([entry.artifact.url for entry in appending.given]),
    )


def _pass_failures(event: Event, report: Callable[[Event], None]) -> None:
    """Pass failures on alone: the shards, and their rows, have been counted."""
    if isinstance(event, ShardFailed):
        report(event)


def _write(record: ShardRecord, appending: Appending, artifact: Artifact) -> ShardRecord:
    names = appending.lacks(record)
    return append_captions(record, artifact, [e for e in appending.given if e.name in names], appending.sets)
