"""`capipe embed`, and its embeddings in `capipe dedup`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from capipe.manifests.fingerprint import fingerprint
from capipe.models.images.decode import ImageLimits
from capipe.models.images.formats import ImageProblem
from capipe.models.images.preprocess import decode_preprocessed
from capipe.models.scorers.clip import load_clip
from capipe.models.tiny.world.corpus import samples
from capipe.pipeline.inspect.verify import verify

from ..conftest import capipe, one_line, table
from .test_filter_scoring import write_shards


def test_embeddings_are_the_clips_own_and_dedup_takes_them(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    shown = list(samples(24, "heldout", seed=41))
    shards, out = write_shards(tmp_path / "shards", [*shown[:23], shown[0]], 12), tmp_path / "embeddings"
    capipe("embed", "--shards", shards, "--out", out, "--clip", "tiny/clip")
    rows = table(out)
    assert [row["status"] for row in rows].count("unsupported") == 2
    assert verify(str(out)).faults == []
    clip = load_clip("tiny/clip")
    views = decode_preprocessed(shown[3].image, preprocesses=(clip.preprocess,), limits=ImageLimits())
    assert not isinstance(views, ImageProblem)
    assert np.allclose(rows[3]["image_embedding"], clip.encode_images(list(views))[0].numpy(), atol=1e-3)
    marks = tmp_path / "marks"
    capipe("dedup", "--shards", shards, "--out", marks, "--embeddings", out, "--cosine", 0.999)
    marked = table(marks / "marked")
    assert marked[23]["status"] == "duplicate" and marked[23]["duplicate_of"] == marked[0]["key"]


def test_a_clip_that_is_not_there_is_refused_in_a_line(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", list(samples(2, "heldout", seed=42)), 2)
    done = capipe("embed", "--shards", shards, "--out", tmp_path / "out", "--clip", "tiny/captioner", code=2)
    assert "no open_clip_config.json" in one_line(done) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_embeddings_by_another_activation_are_refused_by_that_key(tmp_path: Path) -> None:
    shards, out = write_shards(tmp_path / "shards", list(samples(2, "heldout", seed=43)), 2), tmp_path / "out"
    command = ("embed", "--shards", shards, "--out", out, "--clip", "tiny/clip")
    capipe(*command)
    capipe(*command)
    file = out / "_capipe" / "config.json"
    config = json.loads(file.read_text())
    assert config["semantic"]["scorers"]["clip"]["activation"] == "gelu"
    config["semantic"]["scorers"]["clip"]["activation"] = "quick_gelu"
    config["fingerprint"] = fingerprint(config["semantic"])
    file.write_text(json.dumps(config))
    assert 'scorers.clip.activation: "quick_gelu" -> "gelu"' in one_line(capipe(*command, code=2))
