"""Inputs and comparisons for runs of several processes or machines on one output folder."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from capipe.manifests.manifest import LINES
from capipe.models.tiny.world.corpus import write_corpus
from capipe.pipeline.inspect.verify import verify

from .conftest import capipe

IMAGES, SHARD = 64, 8
CAPTIONS = ["--model", "tiny/captioner", "--engine", "transformers", "--concurrency", "8", "--decode-workers", "1"]


def rendered(folder: Path) -> Path:
    """Shards of rendered pictures."""
    write_corpus(folder / "corpus", IMAGES, "heldout", 3)
    capipe("ingest", folder / "corpus", "--out", folder / "shards", "--shard-size", SHARD)
    return folder / "shards"


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Poll; fails where it never comes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def lines(out: Path) -> list[str]:
    """The shards of the manifest's lines, in the order of their commits."""
    path = out / LINES
    return [json.loads(line)["shard"] for line in path.read_text().splitlines()] if path.exists() else []


def same_shards(out: Path, alone: Path) -> None:
    """Every shard was committed once, with the bytes of a run that was left alone, and nothing lies about."""
    assert max(Counter(lines(out)).values()) == 1 and sorted(lines(out)) == sorted(lines(alone))
    names = sorted(path.name for path in alone.iterdir() if path.suffix in (".parquet", ".tar"))
    assert sorted(path.name for path in out.iterdir() if path.suffix in (".parquet", ".tar")) == names
    for name in names:
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    assert verify(str(out)).faults == []
    left, usual = ({path.name for path in (folder / "_capipe").iterdir()} for folder in (out, alone))
    assert left <= usual | {"guard"} and not left & {"claims", "journal", "owners", "quarantine", "redo", "tmp"}
