"""Run an ingest, and look at what it wrote."""

from __future__ import annotations

import json
import pickle
import tarfile
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from capipe.manifests.files.outside import ANYWHERE, Reach
from capipe.pipeline.jobs.ingest import execute_ingest, plan_ingest
from capipe.pipeline.runners.messages import Pulse, ShardDone
from capipe.stages.ingest.shard import IngestConfig
from capipe.stages.ingest.source_refs import Handles, Item
from capipe.stages.ingest.sources import open_sources
from capipe.stages.reading.columns import Columns

Row = dict[str, Any]
NFC, NFD = "caf\u00e9", "cafe\u0301"


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


def load(
    *sources: object,
    path_column: str | None = None,
    text_column: str | None = None,
    image_folder: str | None = None,
    image_key: str | None = None,
    reach: Reach = ANYWHERE,
    follow_links: bool = False,
) -> list[Item]:
    """The items as a worker gets them: references pickled, then loaded."""
    wanted = Columns(path_column, text_column, image_folder)
    found = open_sources([str(source) for source in sources], wanted, image_key, reach, follow_links)
    refs = pickle.loads(pickle.dumps(list(found)))
    with Handles() as handles:
        items = [ref.load(handles) for ref in refs]
    assert [item.source for item in items] == [ref.source for ref in refs]
    return items


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reasons(items: list[Item]) -> list[str | None]:
    return [item.problem.reason if item.problem else None for item in items]


def names(items: list[Item], root: object = "") -> list[str]:
    """Where items come from, below ``root``."""
    return [item.source.removeprefix(f"{root}/" if root else "") for item in items]
