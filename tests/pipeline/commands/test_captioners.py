"""BLIP, BLIP-2 and ViT-GPT2 by the same commands as chat models: the image alone is what they are asked with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ...conftest import photo
from ...models.captioners import KINDS, write_captioner
from ..conftest import capipe, one_line, table
from ..training import steps, weights


@pytest.fixture
def shards(make_tar: Callable[..., Path], tmp_path: Path) -> Path:
    shapes = [(96, 64), (32, 32), (300, 40), (40, 90)]
    make_tar({f"0000{number}.jpg": photo(number, size) for number, size in enumerate(shapes)})
    return tmp_path / "in"


def annotate(shards: Path, model: Path, out: Path, *more: object, code: int = 0) -> str:
    options = ("--engine", "transformers", "--gpus", "none", "--max-tokens", 8, "--max-attempts", 1)
    done = capipe("annotate", "--shards", shards, "--model", model, "--out", out, *options, *more, code=code)
    return one_line(done) if code == 2 else done.stderr


def test_a_captioner_without_prompts_annotates(shards: Path, tmp_path: Path) -> None:
    model = write_captioner(tmp_path / "model", "vit-gpt2")
    annotate(shards, model, tmp_path / "out")
    captions = [caption for row in table(tmp_path / "out") for caption in row["captions"]]
    assert [caption["name"] for caption in captions] == ["none"] * 4
    assert all(caption["status"] != "engine_error" and 0 < caption["n_tokens"] <= 8 for caption in captions)
    assert len({caption["text"] for caption in captions}) > 1
    assert "VisionEncoderDecoderModel reads no prompt" in annotate(
        shards, model, tmp_path / "other", "--prompt", "dense", code=2
    )
    assert "reads no system message" in annotate(shards, model, tmp_path / "other", "--system", "Be short.", code=2)
    assert "leave it out" in annotate(shards, model, tmp_path / "other", "--max-pixels", 100, code=2)


def test_captions_are_found_by_beams(shards: Path, tmp_path: Path) -> None:
    """As VLRM evaluates: by transformers where nothing else is said, in the configuration, refused for others."""
    model, rules = write_captioner(tmp_path / "model", "blip2"), ("--no-repeat-ngram", 2, "--min-tokens", 4)
    annotate(shards, model, tmp_path / "out", "--beams", 5, *rules)
    captions = [caption for row in table(tmp_path / "out") for caption in row["captions"]]
    assert len(captions) == 4 and all(4 <= caption["n_tokens"] <= 8 for caption in captions)
    line = annotate(shards, model, tmp_path / "out", "--beams", 3, *rules, code=2)
    assert "annotate.beams: 5 -> 3" in line
    other = ("annotate", "--shards", shards, "--model", model, "--out", tmp_path / "other")
    refused = capipe(*other, "--engine", "vllm", "--beams", 5, code=2)
    assert "--beams 5: vLLM does not decode so; give --engine transformers" in one_line(refused)
    assert "set temperature to 0" in one_line(capipe(*other, "--beams", 5, "--temperature", 1, code=2))
    assert not (tmp_path / "other").exists()


def test_a_chat_model_is_asked_with_words(shards: Path, tmp_path: Path) -> None:
    model = Path("tiny/captioner")
    assert "asked with words" in annotate(shards, model, tmp_path / "out", "--prompt", "none", code=2)


SETS = {
    "prompt": "",
    "rewards": [{"kind": "length", "free": 2, "most": 10, "weight": 1.0}],
    "rollout.max_tokens": 10,
    "algorithm.critic": {"hidden": 16},
    "algorithm.kl": 0.1,
    "validation": None,
    "preflight": False,
    "alarms.patience": 9,  # random models rarely end
    "optimizer.lr": 1e-3,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["ppo", "a2c"])
def test_a_captioner_is_trained(kind: str, loss: str, recipe: Path, training_data: Path, tmp_path: Path) -> None:
    model, out = write_captioner(tmp_path / "model", kind), tmp_path / "run"
    settings = {**SETS, "model": str(model), "algorithm.loss": loss}
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    capipe("train", recipe, "--out", out, *flags)
    assert weights(out / "step-000004") != weights(out / "step-000002")
    learnt = [line for line in steps(out) if "loss" in line]
    assert len(learnt) == 4 and all(line["value_loss"] > 0 and line["mismatch"] < 1e-4 for line in learnt)
    annotate(training_data / "held/shards", out / "step-000004", tmp_path / "new")
    assert all(row["captions"] for row in table(tmp_path / "new"))
