"""Artifacts from before the columns of tokens, whole or in some shards: readers take them, and they are resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from capipe.manifests import manifest
from capipe.manifests.artifact import Artifact
from capipe.manifests.fingerprint import canonical
from capipe.manifests.schema import LATER, TOKENS
from capipe.manifests.verify import verify
from capipe.pipeline.inspect.costs import stage_cost
from capipe.pipeline.inspect.discover import find
from capipe.pipeline.report.facts import gather

from ..conftest import photo
from .conftest import CaptionServer, capipe, table

LINES = "_capipe/manifest.jsonl"


def age(folder: Path, *shards: str) -> None:
    """Make shards those of an earlier version: without the columns, without their sums, without who worked on them."""
    lines = []
    for line in (folder / LINES).read_text().splitlines():
        entry = {key: value for key, value in json.loads(line).items() if key != manifest.CHECKSUM}
        if entry["shard"] in shards:
            name = f"{entry['shard']}.parquet"
            old = pq.read_table(folder / name)
            pq.write_table(old.drop_columns([column for column in old.column_names if column in LATER]), folder / name)
            data = (folder / name).read_bytes()
            entry["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            del entry["stats"][TOKENS]
        lines.append(canonical({**entry, manifest.CHECKSUM: manifest._checksum(entry)}))
    (folder / LINES).write_text("".join(f"{line}\n" for line in lines))
    times = [json.loads(line) for line in (folder / "_capipe/times.jsonl").read_text().splitlines()]
    for entry in times:
        if entry.get("shard") in shards:
            del entry["worker"], entry["gpus"], entry["cores"]
    (folder / "_capipe/times.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in times))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / f"photos/{number}.jpg").write_bytes(photo(number))
    capipe("ingest", tmp_path / "photos", "--out", tmp_path / "shards", "--shard-size", 2)
    return tmp_path / "shards"


def annotate(shards: Path, server: CaptionServer, *more: object) -> Path:
    out = shards.parent / "captions"
    capipe("annotate", "--shards", shards, "--out", out, "--model", "m", "--engine", server.url, *more)
    return out


def test_shards_with_and_without_them_are_one_artifact(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    out = annotate(shards, server)
    before, kept = stage_cost("captions", Artifact.open(str(out))), table(out)
    age(out, "00000")
    assert [row.get("output_tokens") for row in table(out)] == [None, None, 5, 5]
    assert verify(str(out)).faults == []
    after = stage_cost("captions", Artifact.open(str(out)))
    assert before is not None and after is not None and (before.rows, after.rows) == (4, 2)
    assert 0 < after.core_seconds <= before.core_seconds
    annotate(shards, server)  # nothing is left to do
    assert server.requests == 4
    capipe("filter", "--shards", shards, "--captions", out, "--clip", "tiny/clip", "--out", tmp_path / "filtered")
    assert [row["re_caption"] for row in table(tmp_path / "filtered/scores")] == [
        row["captions"][0]["text"] for row in kept
    ]
    facts = gather(find(str(tmp_path)))
    assert facts.damaged == {} and [(cost.name, cost.rows) for cost in facts.costs] == [("captions", 2)]
    age(out, "00001")
    assert stage_cost("captions", Artifact.open(str(out))) is None
    assert "What the stages that ask" not in Path(capipe("report", tmp_path).stdout.strip()).read_text()


@pytest.mark.parametrize("older", ["00000", "00001"])
def test_the_viewer_shows_and_filters_them(shards: Path, server: CaptionServer, older: str) -> None:
    pytest.importorskip("fastapi", reason="the viewer needs capipe[view]")
    from capipe.pipeline.view.library import id_of

    from .viewing import all_rows, client_of, get

    age(annotate(shards, server), older)
    with client_of(shards.parent) as client:
        a = id_of("captions")
        rows = all_rows(client, a=a)
        known = [row["key"] for row in rows if row["shard"] != older]
        assert len(rows) == 4 and len(known) == 2
        assert [row["key"] for row in all_rows(client, a=a, filter="output_tokens > 4")] == known
        assert get(client, "catalog")["damaged"] == {}


def test_a_row_that_is_tried_again_is_counted_and_its_neighbours_stay(shards: Path, server: CaptionServer) -> None:
    """An artifact of an earlier version keeps its fingerprint, so that its open rows are done by this one."""
    server.fails = lambda number, image: 422 if image == photo(0) else 200
    out = shards.parent / "captions"
    capipe("annotate", "--shards", shards, "--out", out, "--model", "m", "--engine", server.url, code=1)
    kept = {row["uid"]: row["captions"] for row in table(out) if row["status"] == "ok"}
    age(out, "00000", "00001")
    server.fails = lambda number, image: 200
    asked = server.requests
    annotate(shards, server, "--retry")
    assert server.requests == asked + 1 and verify(str(out)).faults == []
    rows = table(out)
    assert [row["output_tokens"] for row in rows if "output_tokens" in row and row["uid"] not in kept] == [5]
    assert [row.get("output_tokens") for row in rows if row["uid"] in kept] == [None] * 3
    assert {row["uid"]: row["captions"] for row in rows if row["uid"] in kept} == kept
    cost = stage_cost("captions", Artifact.open(str(out)))
    assert cost is not None and (cost.rows, cost.per_row("output_tokens")) == (1, 5)
