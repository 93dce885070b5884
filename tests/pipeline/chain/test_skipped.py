"""Chains whose stages leave rows out by marks: what they cost before and after, and what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.pipeline.chain.command import show_plan
from capipe.pipeline.chain.validate import check_chain
from capipe.pipeline.inspect.chain_state import load_chain

from ...conftest import photo
from ..chains import chain_of, written
from ..conftest import CaptionServer, capipe, table

RATE = {"per_device": 2, "devices": 1, "source": "assumed"}


def stages(pictures: Path, server: CaptionServer) -> dict[str, Any]:
    """Five pictures, two of them copies, of which a server captions the others."""
    pictures.mkdir()
    for number, seed in enumerate([1, 2, 1, 3, 2]):
        (pictures / f"{number}.jpg").write_bytes(photo(seed))
        (pictures / f"{number}.txt").write_text(f"alt {seed}")
    asked = {"model": "m", "engine": server.url, "concurrency": 1}
    return {
        "shards": {"stage": "ingest", "inputs": {"sources": {"path": str(pictures)}}, "config": {"shard-size": 3}},
        "marks": {"stage": "dedup", "inputs": {"shards": "shards"}},
        "captions": {
            "stage": "annotate",
            "inputs": {"shards": "shards", "marks": "marks"},
            "config": asked,
            "rate": RATE,
        },
    }


def plan_of(folder: Path, parts: dict[str, Any], *sets: str) -> list[str]:
    out, told = folder / "out", list[str]()
    show_plan(chain_of(folder, *sets, stages=parts), out, load_chain(out), [], told.append)
    return [line for line in told if not line.startswith("    ")]


def test_a_chain_captions_what_its_marks_leave_and_counts_no_other_row(tmp_path: Path, server: CaptionServer) -> None:
    parts = stages(tmp_path / "pictures", server)
    assert "captions: annotate, to do; at most 5 rows; 5 / 2 a second = 2.5 s" in plan_of(tmp_path, parts)[3]
    expected = plan_of(tmp_path, parts, "stages.captions.expects=4")[3]
    assert "captions: annotate, to do; 4 rows; 4 / 2 a second" in expected
    capipe("run", written(tmp_path, parts), "--out", tmp_path / "out", "--set", "stages.captions=null")
    for sets in ([], ["stages.captions.expects=4"]):  # counted, not expected
        assert "captions: annotate, to do; 3 rows; 3 / 2 a second = 1.5 s" in plan_of(tmp_path, parts, *sets)[3]
    part = "stages.captions.inputs.shards={stage: shards, first: 1}"
    assert "captions: annotate, to do; at most 3 rows" in plan_of(tmp_path, parts, part)[3]
    capipe("run", written(tmp_path, parts), "--out", tmp_path / "out")
    assert [row["status"] for row in table(tmp_path / "out/captions")] == ["ok", "ok", "duplicate", "ok", "duplicate"]
    assert server.requests == 3
    state = load_chain(tmp_path / "out")
    assert state is not None and (done := state.stage("captions")) is not None and done.measured is not None
    assert done.measured["rows"] == 3 and done.inputs == {"shards": "shards", "marks": "marks"}
    assert "captions: annotate, done; 5 rows" in plan_of(tmp_path, parts)[3]
    again = "stages.marks.config.radius=3"
    assert "captions: annotate, changed (its input marks); at most 5 rows" in plan_of(tmp_path, parts, again)[3]


def test_a_chain_whose_embeddings_are_of_another_clip_is_refused_before_it_starts(
    tmp_path: Path, server: CaptionServer
) -> None:
    parts = stages(tmp_path / "pictures", server)
    del parts["captions"]
    parts["seen"] = {"stage": "embed", "inputs": {"shards": "shards"}, "config": {"clip": "tiny/clip"}}
    inputs = {"shards": "shards", "embeddings": "seen"}
    parts["final"] = {"stage": "filter", "inputs": inputs, "config": {"clip": "tiny/clip"}}
    assert not check_chain(chain_of(tmp_path, stages=parts)).problems
    for override, said in [
        (
            "stages.final.config.clip=tiny/eval-clip",
            "embeds with clip: tiny/clip, and this scores with clip: tiny/eval",
        ),
        ("stages.seen.config.dtype=float16", "embeds with dtype: float16, and this scores with dtype: None"),
    ]:
        (line,) = check_chain(chain_of(tmp_path, override, stages=parts)).problems
        assert "stages.final.inputs.embeddings: stage seen " in line and said in line
    wrong = "stages.final.inputs.embeddings=marks"
    with pytest.raises(BadInput, match=r"final\.inputs\.embeddings: stage marks"):
        chain_of(tmp_path, wrong, stages=parts)


@pytest.mark.slow
def test_a_chain_in_the_shape_of_caprl_5m(tmp_path: Path, server: CaptionServer) -> None:
    """Images are seen once and copied once: marks, an index and embeddings stand between."""
    parts = stages(tmp_path / "pictures", server)
    shards, clip = "shards", {"clip": "tiny/clip"}
    parts["seen"] = {"stage": "embed", "inputs": {"shards": shards}, "config": clip}
    parts["marks"]["inputs"]["embeddings"] = "seen"
    parts["marks"]["config"] = {"cosine": 0.999}
    kept = {"shards": shards, "marks": "marks", "embeddings": "seen"}
    parts["kept"] = {"stage": "filter", "inputs": kept, "config": {**clip, "text": "org", "index": True}}
    parts["captions"]["inputs"]["marks"] = "kept"
    scored = {"shards": shards, "captions": "captions", "embeddings": "seen"}
    parts["final"] = {"stage": "filter", "inputs": scored, "config": {**clip, "text": "re"}}
    capipe("run", written(tmp_path, parts), "--out", tmp_path / "out")
    assert server.requests == 3 and not list((tmp_path / "out/kept").rglob("*.tar"))
    for folder in ("kept/shards", "captions", "final/shards"):
        assert [row["status"] for row in table(tmp_path / "out" / folder)] == [
            *("ok", "ok", "duplicate"),
            *("ok", "duplicate"),
        ]
        capipe("verify", tmp_path / "out" / folder)
    assert all(row["re_clip_score"] is not None for row in table(tmp_path / "out/final/shards") if row["caption"])
