"""A program for tests: the real runners with a stage whose loads fail, and whose decoders hang, where they are told to.

Imported as a module by the processes it starts: :func:`.leftovers.staged` is the command that runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from capipe.errors import BadInput, CapipeError, RunFailed
from capipe.manifests.artifact import Artifact
from capipe.manifests.shards import Row, expand
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.images.decode_pool import DecodePool
from capipe.pipeline.runners import worker_slots
from capipe.pipeline.runners.placement import Placement
from capipe.pipeline.runners.progress import Progress
from capipe.pipeline.runners.ray.cluster import RayCluster
from capipe.pipeline.runners.worker import RowByRow

SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "uid", "status", "error")])


@dataclass(frozen=True)
class Staged:
    """``fates`` of the loads at each place, in turn; after the last all is well. A place is what CUDA_VISIBLE_DEVICES
    says, or on a cluster the n-th machine that asked. ``notes``: a folder for what happened. ``fifo``: decoders read
    it. ``engine``: started where a load succeeds.
    """

    notes: str
    fates: dict[str, list[str]] = field(default_factory=dict)
    fifo: str | None = None
    engine: str | None = None
    cluster: bool = False
    name: str = "staged"

    async def load(self) -> Echo:
        place = self._machine() if self.cluster else os.environ.get("CUDA_VISIBLE_DEVICES", "")
        tries = len(list(Path(self.notes).glob(f"load.{place}.*")))
        Path(self.notes, f"load.{place}.{tries}").touch()
        fates = self.fates.get(place, [])
        fate = fates[min(tries, len(fates) - 1)] if fates and (tries < len(fates) or fates[-1] != "well") else "well"
        if fate == "taken":
            raise RunFailed(f"no memory on the card of place {place}")
        if fate == "broken":
            raise RuntimeError(f"place {place} has fallen off the bus\nand more lines")
        if fate == "late":
            while not Path(self.notes, "load.0.2").exists():
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)
        if fate == "exit":
            os._exit(5)
        if fate == "bad input":
            while not list(Path(self.notes).glob("ready.*")):  # not before another one is at work
                await asyncio.sleep(0.05)
            raise BadInput("no such model")
        engine = await load_engine(EngineConfig(self.engine, "tiny/captioner")) if self.engine else None
        Path(self.notes, f"ready.{place}").touch()
        return Echo(self, engine)

    def _machine(self) -> str:
        """The number of this machine in the order in which they came."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        for number in range(10):
            path = Path(self.notes, f"machine.{number}")
            with contextlib.suppress(FileExistsError), path.open("x") as file:
                file.write(node)
            deadline = time.monotonic() + 5
            while not path.read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            if path.read_text() == node:
                return str(number)
        raise AssertionError("too many machines")


class Echo(RowByRow):
    """Passes rows on, a few a second."""

    schema, window, writes_tar = SCHEMA, 4, False

    def __init__(self, stage: Staged, engine: Any) -> None:
        self._stage, self._engine = stage, engine
        self._pool = DecodePool(2, functools.partial(hang, path=stage.fifo)) if stage.fifo else None

    async def process_row(self, row: Row) -> dict[str, Any]:
        if self._pool is not None:
            await self._pool.decode(row.image or b"")
        await asyncio.sleep(0.05)
        return self.passed_on(row)

    def passed_on(self, row: Row) -> dict[str, Any]:
        return {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error}

    def members(self, source: Row, row: dict[str, Any]) -> dict[str, bytes] | None:
        return None

    def gauges(self) -> dict[str, int]:
        return {}

    async def aclose(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._engine is not None:
            await self._engine.aclose()


def hang(data: bytes, path: str) -> int:
    """A decoder that is blocked in a system call: nobody writes to that pipe."""
    Path(f"{path}.{os.getpid()}").touch()
    with open(path, "rb") as pipe:  # noqa: PTH123
        return len(pipe.read())


def main(words: Sequence[str] | None = None) -> None:
    options = json.loads((words or sys.argv[1:])[0])
    worker_slots.PAUSES = tuple(options.pop("pauses", [0.2, 0.2]))
    shards, out, gpus = options.pop("shards"), options.pop("out"), options.pop("gpus", [])
    ray = RayCluster(options.pop("address"), options.pop("workers")) if "address" in options else None
    stage = Staged(**options, cluster=ray is not None)
    artifact = Artifact.create(out, stage.name, {}, {})
    todo = [shard for shard in expand(shards) if shard.name not in artifact.committed()]
    try:
        with Progress(stage.name, len(todo)).shown(Console(stderr=True)) as report:
            outcome = Placement(tuple(gpus), ray).run(stage, artifact, report, todo)
    except CapipeError as error:
        print(f"capipe: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        artifact.close()
    sys.exit(int(bool(outcome.quarantined)))
