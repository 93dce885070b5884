"""Run an ingest, and look at what it wrote."""

from __future__ import annotations

import tarfile
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from capipe.pipeline.events import Pulse, ShardDone
from capipe.pipeline.ingesting import execute_ingest, plan_ingest
from capipe.stages.ingest import IngestConfig

Row = dict[str, Any]


def ingest(*sources: object, out: Path | str, workers: int = 0, fresh: bool = False, **config: Any) -> list[Any]:
    """Run an ingest to its end; returns what became of its shards."""
    events: list[Any] = []
    made = plan_ingest([str(s) for s in sources], str(out), IngestConfig(**config), workers=workers, fresh=fresh)
    try:
        execute_ingest(made, events.append, threading.Event())
    finally:
        made.artifact.close()
    pulses, shards = ([e for e in events if isinstance(e, Pulse) == wanted] for wanted in (True, False))
    assert [pulse.rows for pulse in pulses] == [e.record.rows for e in shards if isinstance(e, ShardDone)]
    return shards


def rows(out: Path) -> list[Row]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                file = tar.extractfile(name)
                assert file is not None
                found[name] = file.read()
    return found
