"""A table of the user's own, joined with shards: an artifact with a row for each of their rows, in their order.

It is made once, in ``joined/`` of the output of `capipe filter`, and read as a sidecar from then on: another condition
reads the table's bytes for their digest and nothing else of it. A row of which the table has nothing is ``missing``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ....errors import ArtifactMismatch, BadInput
from ....manifests.artifact import Artifact
from ....manifests.joining.columns import joined_type
from ....manifests.joining.table import ParquetTable, SortedTable, read_table
from ....manifests.manifest import ShardRecord
from ....manifests.schema import BASE
from ....manifests.shards import InputShard, expand, input_artifact, join, read_places
from ....manifests.sharing.claims import alone
from ....manifests.status import Status
from ....manifests.withdrawal.applied import apply
from ....manifests.withdrawal.rows import REASON
from ....manifests.withdrawal.uid_set import UidSet
from ....stages.filter.joined import STAGE
from ....terminal import print_err
from ...runners.interrupts import interrupts
from .columns import BASE_SCHEMA, SCORES, companion_of, read_columns
from .sources import Chosen, Joined, Opened, joined

FOLDER = "joined"  # in the output of `capipe filter`


def join_tables(
    chosen: Chosen, scores: Artifact, pattern: str, folder: str, drop: UidSet | None = None, share: bool = False
) -> list[Joined] | None:
    """The chosen sources, each table of theirs joined in a folder below ``folder``; None if stopped.

    Raises as :func:`join_table`.
    """
    artifacts = []
    for one, columns, name in zip(chosen.others, chosen.columns, _folders(chosen.others), strict=True):
        made: Artifact | None
        if isinstance(one.origin, Artifact):
            made = one.origin
        else:
            out = f"{folder}/{FOLDER}/{name}"
            made = join_table(one.origin, list(columns.values()), scores, pattern, out, drop, share)
        if made is None:
            return None
        artifacts.append(made)
    return joined(chosen, artifacts)


def _folders(opened: Sequence[Opened]) -> list[str]:
    """A folder name for each source: the user's name, or its file's. Raises BadInput if two tables share one."""
    found: dict[str, str] = {}
    names = []
    for one in opened:
        stem = one.place.rpartition("/")[2].removesuffix(".parquet")
        name = one.name or re.sub(r"\W+", "_", stem, flags=re.ASCII)
        if isinstance(one.origin, ParquetTable):
            if name in found:
                text = f"--scores {one.place}: is called {name}, as {found[name]} is"
                raise BadInput(f"{text}; give it another name: NAME={one.place}")
            found[name] = one.place
        names.append(name)
    return names


def join_table(
    table: ParquetTable,
    columns: Sequence[str],
    scores: Artifact,
    pattern: str,
    out: str,
    drop: UidSet | None = None,
    share: bool = False,
) -> Artifact | None:
    """The table's ``columns`` for the rows of the shards of ``scores``, in the artifact ``out``; None if stopped.

    Shards that are there are kept; the table is read only if one is missing. What another table, or other columns,
    left in ``out`` is replaced. Raises CapipeError if the table cannot be joined, or has no row of these images.
    """
    source = input_artifact(pattern)
    shards = join(expand(pattern, source), {SCORES: scores})
    kinds = {name: joined_type(table.columns[name]) for name in sorted({*columns})}
    semantic = {
        "contents": table.digest,
        "by": list(table.by),
        "columns": {name: str(kind) for name, kind in kinds.items()},
        "input": None if source is None else source.fingerprint,
    }
    run = {"shards": pattern, "shards_total": len(shards), "table": table.given}
    reads = [*read_places(pattern, shards, [scores]), *table.files]
    artifact, stop = _created(out, semantic, run, reads, share), threading.Event()
    try:
        with interrupts(stop.set), alone(artifact.claims, STAGE):
            withdrawal = apply(artifact, drop)
            todo = _todo(artifact, shards, withdrawal.touched)
            if todo:
                print_err(f"{table.given}: its {table.rows:,} rows are joined by {' and '.join(table.by)}")
                _write(todo, read_table(table, list(kinds)), kinds, artifact, scores, withdrawal.uids, stop)
            if stop.is_set():
                return None
            withdrawal.conclude()
        _refuse_strangers(table, artifact, shards)
    finally:
        artifact.close()
    return Artifact.open(out)


def _created(
    out: str, semantic: Mapping[str, Any], run: Mapping[str, Any], reads: Sequence[str], share: bool
) -> Artifact:
    try:
        return Artifact.create(out, STAGE, semantic, run, share=share, reads=reads)
    except ArtifactMismatch as error:
        if share:
            raise BadInput(f"{error}; run the command once without --share, which joins the table anew") from None
        if Artifact.open(out).stage != STAGE:
            raise
    return Artifact.create(out, STAGE, semantic, run, fresh=True, reads=reads)


def _todo(
    artifact: Artifact, shards: Sequence[InputShard], touched: Mapping[str, ShardRecord]
) -> list[tuple[InputShard, ShardRecord | None]]:
    """Shards to join, each with the version to replace: new ones, those scored again, and those with withdrawn rows."""
    committed, todo = artifact.committed(), []
    for shard in shards:
        record = committed.get(shard.name)
        same = record is not None and record.input.get(SCORES) == companion_of(shard, SCORES).sha256
        if not same or shard.name in touched:
            todo.append((shard, record))
    return todo


def _write(
    todo: Sequence[tuple[InputShard, ShardRecord | None]],
    table: SortedTable,
    kinds: Mapping[str, pa.DataType],
    artifact: Artifact,
    scores: Artifact,
    withdrawn: UidSet,
    stop: threading.Event,
) -> None:
    """Join and commit shards until ``stop`` is set, one at a time."""
    schema = pa.schema([*BASE, *(pa.field(name, kind) for name, kind in kinds.items())])
    scored = scores.committed()
    for shard, over in todo:
        if stop.is_set():
            return
        companion = companion_of(shard, SCORES)
        listed = read_columns(companion, BASE_SCHEMA, BASE_SCHEMA.names)
        made_of = {
            name: value for name, value in scored[shard.name].input.items() if name in ("url", "digest", "bytes")
        }
        with artifact.begin(shard.name, schema, over=over) as out:
            for row in joined_rows(listed, shard.name, table, kinds, withdrawn):
                out.write(row)
            out.commit(rows_in=len(listed), input_info={**made_of, SCORES: companion.sha256})


def joined_rows(
    listed: pa.Table, shard: str, table: SortedTable, kinds: Mapping[str, pa.DataType], withdrawn: UidSet
) -> list[dict[str, Any]]:
    """A row for each row of a shard (``listed``: what all artifacts have of it), with the values of its image."""
    keys, uids = (listed.column(name).combine_chunks() for name in ("key", "uid"))
    places = table.places(shard, keys, uids)
    gone = withdrawn.mask(uids)
    values = [table.values(name, places).cast(kind).to_pylist() for name, kind in kinds.items()]
    rows = []
    for index, row in enumerate(listed.to_pylist()):
        if gone[index] or row["status"] == Status.WITHDRAWN:
            row |= {"status": str(Status.WITHDRAWN), "error": REASON}
        elif places[index] >= 0:
            row |= {name: column[index] for name, column in zip(kinds, values, strict=True)}
        elif row["status"] == Status.OK:
            row |= {"status": str(Status.MISSING), "error": f"no row of the table is of its {' and '.join(table.by)}"}
        rows.append(row)
    return rows


def _refuse_strangers(table: ParquetTable, artifact: Artifact, shards: Sequence[InputShard]) -> None:
    """Raise BadInput if no row of the table is of an image of these shards."""
    committed = artifact.committed()
    counts = [committed[shard.name].rows for shard in shards]
    if any(rows.get(Status.OK) for rows in counts) or not any(rows.get(Status.MISSING) for rows in counts):
        return
    by = " and ".join(table.by)
    others = [name for name in table.by if name != "uid"]
    hint = "give a table of these images"
    if "uid" in table.by and others:
        hint += f", or leave out its column {others[0]} to join it by uid alone"
    raise BadInput(f"--scores {table.given}: none of its {table.rows:,} rows is of these shards by {by}; {hint}")
