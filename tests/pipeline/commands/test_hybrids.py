"""Qwen3.5 by the same commands as other chat models: trained, and its checkpoint annotates."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...models.hybrids import write_hybrid
from ..conftest import capipe, table
from ..training import steps, weights


@pytest.mark.slow
def test_a_hybrid_is_trained_and_its_checkpoint_captions(recipe: Path, training_data: Path, tmp_path: Path) -> None:
    model, out = write_hybrid(tmp_path / "model"), tmp_path / "run"
    settings = {
        "model": model, "rewards": '[{"kind": "clip", "model": "tiny/clip"}]', "steps": 2,
        "rollout.max_tokens": 10, "validation": "null", "alarms.patience": 9, "optimizer.lr": 1e-3,
    }  # fmt: skip
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = capipe("train", recipe, "--out", out, *flags)
    assert "preflight: packed captions differ from plain ones by " in done.stdout
    assert len(steps(out)) == 2
    assert all(line["skipped"] is None and 0 < line["mismatch"] < 1e-4 for line in steps(out))
    assert weights(out / "step-000002") != weights(model)
    options = ("--engine", "transformers", "--gpus", "none", "--max-tokens", 8, "--max-attempts", 1)
    shards = training_data / "held/shards"
    capipe("annotate", "--shards", shards, "--model", out / "step-000002", "--out", tmp_path / "new", *options)
    assert all(row["captions"] and row["status"] != "engine_error" for row in table(tmp_path / "new"))
