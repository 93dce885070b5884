"""`capipe train` with captions drawn by others than the policy's own modules: a copy, vLLM, a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from capipe.models.engines.model_folder import resolve_model
from capipe.models.engines.vllm.weight_sync import EXTENSION
from capipe.pipeline.jobs.train import run_training
from capipe.trainer.recipe import load_recipe

from ...serving import serving
from ..conftest import capipe, one_line
from ..training import steps, weights

pytestmark = pytest.mark.slow

WRITTEN = ["frozen-00000.safetensors", "learning-00000.safetensors"]
SETS = ("steps=2", "rollout.images=2", "validation.every=2")


def drawn(run: Path, step: int) -> list[str]:
    """The captions of a step, in order."""
    entries = map(json.loads, (run / "captions.jsonl").read_text().splitlines())
    return [entry["caption"] for entry in entries if entry["step"] == step]


def train(recipe: Path, out: Path, *changes: str, code: int = 0) -> str:
    flags = [word for change in (*SETS, *changes) for word in ("--set", change)]
    done = capipe("train", recipe, "--out", out, *flags, code=code)
    return one_line(done) if code else done.stdout


async def test_a_step_ahead_is_off_policy_and_resumes_exactly(recipe: Path, tmp_path: Path) -> None:
    changes = ["rollout.overlap=true", "rollout.temperature=0.8", "optimizer.lr=1e-3", "steps=5", "save_every=3"]
    loaded = load_recipe(recipe, changes)
    whole = await run_training(loaded, tmp_path / "whole", fresh=False, say=lambda line: None)
    done = [line for line in steps(tmp_path / "whole") if "loss" in line]
    weights_apart = [abs(line["correction"] - 1) for line in done]
    assert weights_apart[0] < 1e-5 and weights_apart[3] < 1e-5  # the first of all, and the first after a checkpoint
    assert min(weights_apart[at] for at in (1, 2, 4)) > 1e-3  # the others' captions are of weights one step older
    assert min(done[at]["mismatch"] for at in (1, 2, 4)) > 1e-3

    def stops(line: str) -> None:
        if line.startswith("step 4/"):
            raise KeyboardInterrupt

    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        await run_training(loaded, parts, fresh=False, say=stops)
    last = await run_training(loaded, parts, fresh=False, say=lambda line: None)
    assert weights(last) == weights(whole) and steps(parts) == steps(tmp_path / "whole")


def test_vllm_draws_the_captions_of_the_weights_in_training(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    train(recipe, tmp_path / "vllm", "rollout.engine=vllm", "rollout.overlap=true", "save_every=1")
    train(recipe, tmp_path / "own")
    found = [line for line in steps(tmp_path / "vllm") if "loss" in line]
    assert len(found) == 2 and all(0 <= line["probe"] < 1e-3 for line in found)
    for step in (0, 1):  # the same draws, up to one that lies on the edge between two tokens
        pairs = list(zip(drawn(tmp_path / "vllm", step), drawn(tmp_path / "own", step), strict=True))
        assert len(pairs) == 6 and sum(one != other for one, other in pairs) <= 1


def test_a_server_draws_captions_and_gets_each_steps_weights(
    recipe: Path, tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    pytest.importorskip("vllm")
    model = str(resolve_model("tiny/captioner"))
    arguments = ("--max-model-len", "512", "--max-num-seqs", "16", "--worker-extension-cls", EXTENSION)
    with serving(model, unused_tcp_port_factory(), *arguments, VLLM_SERVER_DEV_MODE="1") as url:
        train(recipe, tmp_path / "first", f"rollout.engine={url}", "optimizer.lr=1e-3")
        # Another run from the start: the server still has the first one's weights until the run gives it its own.
        train(recipe, tmp_path / "second", f"rollout.engine={url}", f"rollout.sync_folder={tmp_path / 'shared'}")
    for folder in ("first/sampling", "shared"):  # all weights before the first caption, the frozen tower's only then
        assert sorted(file.name for file in (tmp_path / folder).iterdir()) == WRITTEN
    for run in ("first", "second"):
        found = [line for line in steps(tmp_path / run) if "loss" in line]
        assert len(found) == 2 and all(0 <= line["probe"] < 1e-3 for line in found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("rollout.engine=sglang", "rollout.engine: "),
        ("rollout.engine=http://127.0.0.1:9/v1", "no server answers"),
        ("rollout={engine: vllm, temperature: 0.7}", "for temperature 1"),
        ("rollout.sleep=true", "sleep is for engine vllm"),
        ("rollout={engine: vllm, sync: direct}", "the policy is on the cpu; set rollout.sync: folder"),
        ("rollout.sync=direct", "direct is for engine vllm and servers"),
    ],
)
def test_engines_that_cannot_be_meant_are_refused(recipe: Path, tmp_path: Path, change: str, says: str) -> None:
    assert says in train(recipe, tmp_path / "run", change, code=2)
