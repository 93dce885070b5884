"""Questions of `capipe ask` that a model did not answer, in rows that are ok because it answered others."""

from __future__ import annotations

import pyarrow.compute as pc

from ...manifests.artifact import Artifact
from ...manifests.schema import ASK_COLUMN
from ...manifests.status import Status
from .sampled import sampled

SHARDS = 256  # of an artifact, that are read
LONGEST_REASON = 200  # characters of a row's reason


def warnings(artifact: Artifact) -> list[str]:
    """A line for each question that some ok rows have no probability for, with the first such row's reason."""
    shards = list(artifact.committed())
    seen = sampled(shards, SHARDS)
    ok, unscored, reasons = 0, dict[str, int](), dict[str, str]()
    for shard in seen:
        with artifact.parquet(shard) as parquet:
            columns = [name for name in parquet.schema_arrow.names if name.startswith(ASK_COLUMN)]
            table = parquet.read(columns=["status", "error", *columns], use_threads=False)
        table = table.filter(pc.equal(table["status"], str(Status.OK)))
        ok += len(table)
        for name in columns:
            if table[name].null_count:
                unscored[name] = unscored.get(name, 0) + table[name].null_count
                first = pc.index(pc.is_null(table[name]), True).as_py()
                reasons.setdefault(name, " ".join(str(table["error"][first]).split())[:LONGEST_REASON])
    rows = f"{ok:,} ok rows" + (f" of {len(seen)} shards" if len(seen) < len(shards) else "")
    return [
        f"{name} has no value in {count:,} of {rows} (the first: {reasons[name]})" for name, count in unscored.items()
    ]
