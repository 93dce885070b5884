"""`capipe train` as users run it: the bundled captioner, a quiz, a few steps."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from capipe.errors import BadInput
from capipe.models.bundled import resolve
from capipe.models.tiny.train.bundle import load_tensors
from capipe.pipeline.jobs.train import run_training
from capipe.trainer.recipe import load_recipe

from ..conftest import capipe, one_line, table
from ..training import same_state, state, steps, weights

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


def test_a_run_trains_and_its_checkpoint_captions(recipe: Path, training_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = capipe("train", recipe, "--out", out)
    assert done.stdout.strip().splitlines()[-1] == f"checkpoint: {out / 'step-000004'}"
    assert "vision frozen (" in done.stdout and "llm learns (" in done.stdout
    assert done.stdout.count("validation after") == 3  # before the first step, too
    logged = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert len(logged) == 4 * 3 * 3 and {entry["step"] for entry in logged} == {0, 1, 2, 3}
    assert all(entry["details"]["quiz"]["asked"] for entry in logged)
    assert all(abs(line["ratio_max"] - 1) < 1e-6 for line in steps(out) if "loss" in line)
    assert weights(out / "step-000004") != weights(out / "step-000002")
    shards = training_data / "held/shards"
    annotated = ("--engine", "transformers", "--max-tokens", 40, "--prompt", "plain")
    capipe("annotate", "--shards", shards, "--out", tmp_path / "new", "--model", out / "step-000004", *annotated)
    assert {row["status"] for row in table(tmp_path / "new")} <= {"ok", "filtered"}
    capipe("train", recipe, "--out", out)  # all done: nothing is done again
    assert len((out / "captions.jsonl").read_text().splitlines()) == 36


ADAPTER = ("trained.lora={rank: 4, dropout: 0.1}", "algorithm.kl=0.05", "optimizer.lr=1e-3", "dtype=bfloat16")


LAST = ("model_files=last", "validation=null")  # which would make the best one a model folder, too
CRITIC = ("algorithm.loss=ppo", "algorithm.critic={rate: 20}", "algorithm.kl=0.05")


@pytest.mark.slow
@pytest.mark.parametrize("sets", [(), CRITIC, LAST, pytest.param(ADAPTER, marks=needs_peft)])
async def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    recipe: Path, tmp_path: Path, sets: tuple[str, ...]
) -> None:
    """N + N steps are 2 N steps, to the last bit of weights, figures and captions."""
    loaded = load_recipe(recipe, sets)
    whole = await run_training(loaded, tmp_path / "whole", fresh=False, say=lambda line: None)

    def stops(line: str) -> None:
        if line.startswith("step 3/"):
            raise KeyboardInterrupt

    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        await run_training(loaded, parts, fresh=False, say=stops)
    assert (parts / "step-000002/config.json").exists() == (sets is not LAST)
    said: list[str] = []
    last = await run_training(loaded, parts, fresh=False, say=said.append)
    assert f"going on from {parts / 'step-000002'}" in said
    assert last.name == whole.name == "step-000004" and weights(last) == weights(whole)
    assert steps(parts) == steps(tmp_path / "whole")
    assert (parts / "captions.jsonl").read_bytes() == (tmp_path / "whole/captions.jsonl").read_bytes()
    assert same_state(last, whole)


@pytest.mark.slow
def test_critics_learn_by_the_same_loop(recipe: Path, tmp_path: Path) -> None:
    sets = ("algorithm.loss=ppo", "algorithm.critic={lam: 1.0}", "algorithm.epochs=2", "algorithm.kl=0.05", "steps=2")
    flags = [part for each in sets for part in ("--set", each)]
    capipe("train", recipe, "--out", tmp_path / "run", *flags)
    assert (tmp_path / "run/step-000002/critic/value_head.safetensors").exists()
    beside = [file.name for file in (tmp_path / "run/step-000002").glob("*.safetensors")]
    assert beside == ["model.safetensors"]  # vLLM takes all that lies there for the model's
    last = [line for line in steps(tmp_path / "run") if "loss" in line][-1]
    assert last["value_loss"] > 0 and last["kl"] > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("rollout.imagse=3", "rollout.imagse: "),
        ("algorithm.loss=ppo", "value head"),
        ("data.fingerprint=0123456789ab", "its fingerprint is"),
        ("validation.reader=tiny/reader", "never a reward"),
        ("model=tiny/reader", "reads text only"),
        pytest.param("trained.lora={targets: [qkv]}", "the language model has no qkv; it has", marks=needs_peft),
        ("rollout.max_tokens=5000", "which has room for 2016 beside the longest question"),
        ("data.shards=nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_meant_is_refused(recipe: Path, tmp_path: Path, change: str, says: str) -> None:
    assert says in one_line(capipe("train", recipe, "--out", tmp_path / "run", "--set", change, code=2))
    assert not list((tmp_path / "run").glob("step-*"))


@pytest.mark.slow
def test_captions_longer_than_the_captioner_writes_are_refused(recipe: Path, tmp_path: Path) -> None:
    unread = ("--set", "rewards=[{kind: clip, model: tiny/clip}]", "--set", "validation=null")
    sets = ("--set", "rollout.max_tokens=5000", *unread)
    said = one_line(capipe("train", recipe, "--out", tmp_path / "run", *sets, code=2))
    assert "than the 2048 that the model takes" in said


@pytest.mark.slow
def test_held_out_images_are_not_trained_on(recipe: Path, training_data: Path, tmp_path: Path) -> None:
    same = [
        word
        for key, name in (("shards", "shards"), ("questions", "qa"))
        for word in ("--set", f"validation.{key}={training_data / 'train' / name}")
    ]
    assert "trained on, too" in one_line(capipe("train", recipe, "--out", tmp_path / "run", *same, code=2))


@pytest.mark.slow
def test_another_recipe_leaves_a_run_alone(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    capipe("train", recipe, "--out", out, "--set", "steps=2")
    before = weights(out / "step-000002")
    refused = capipe("train", recipe, "--out", out, "--set", "steps=2", "--set", "seed=1", code=2)
    assert "seed" in one_line(refused) and weights(out / "step-000002") == before
    capipe("train", recipe, "--out", out, "--set", "steps=2", "--set", "seed=1", "--fresh")
    assert weights(out / "step-000002") != before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "change"),
    [
        ("replicated", "seed=0"),
        ("sharded", "seed=0"),
        ("sharded", "dtype=bfloat16"),
        pytest.param("replicated", "trained.lora={rank: 4}", marks=needs_peft),
    ],
)
def test_two_processes_train_as_one(recipe: Path, tmp_path: Path, parallel: str, change: str) -> None:
    rate = "1e-3" if "lora" in change else "1e-5"
    flags = ("--set", "steps=2", "--set", "rollout.images=4", "--set", change, "--set", f"optimizer.lr={rate}")
    capipe("train", recipe, "--out", tmp_path / "one", *flags)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "capipe.pipeline", "train", recipe, "--out", tmp_path / "two", *flags]
    done = subprocess.run(
        [*torchrun, *map(str, command), "--set", f"parallel={parallel}"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1  # said once
    one, two = (load_file(tmp_path / run / "step-000002/model.safetensors") for run in ("one", "two"))
    start = load_tensors(Path(resolve("tiny/captioner")))
    if "dtype" in change:  # written in bfloat16, in which such small steps do not show
        kinds = {weight.dtype for written in (one, two) for weight in written.values()}
        assert kinds == {torch.bfloat16} and one.keys() == two.keys() == start.keys()
        one, two = (state(tmp_path / run / "step-000002") for run in ("one", "two"))
        one, two = ({_written(name): own[name] for name in own if name.startswith("weight.")} for own in (one, two))
        assert len(start.keys() & one.keys()) > 10
        start = {name: start.get(name, one[name]) for name in one}
    moved = max(float((one[name] - start[name].float()).abs().max()) for name in one)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert apart < 0.05 * moved
    captions = (tmp_path / "two").glob("captions*.jsonl")
    assert [len(file.read_text().splitlines()) for file in captions] == [12, 12]


def _written(name: str) -> str:
    """The name in a model's file of a weight in a checkpoint's state."""
    return name.removeprefix("weight.model.").replace("model.language_model.", "model.")


@pytest.mark.slow
async def test_more_processes_than_images_are_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capipe.trainer.distributed import Distributed

    monkeypatch.setattr("capipe.pipeline.jobs.train.join", lambda sharded: Distributed(0, 4, sharded))
    with pytest.raises(BadInput, match="4 processes for 3 images"):
        await asyncio.wait_for(run_training(load_recipe(recipe), tmp_path / "run", fresh=False, say=print), 60)
