"""`capipe train` with rewards that ask no questions: images alone, a few steps of the bundled captioner."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from capipe.models.bundled import is_bundled
from capipe.pipeline.jobs.train import run_training
from capipe.trainer.recipe import load_recipe

from ...small_models import blip_retrieval, diffusion, opt, vgg_net
from ..conftest import capipe, one_line, table
from ..test_extending import EXAMPLES
from ..training import steps, weights

pytestmark = pytest.mark.slow


@pytest.fixture
def alone(training_data: Path, tmp_path: Path) -> Path:
    """Images without questions, rewarded by CLIP."""
    settings: dict[str, Any] = {
        "model": "tiny/captioner",
        "prompt": "Describe the image.",
        "data": {"shards": str(training_data / "train/shards")},
        "rewards": [{"kind": "clip", "model": "tiny/clip"}],
        "rollout": {"images": 3, "group": 3, "max_tokens": 60},
        "optimizer": {"lr": 1e-4, "warmup": 1},
        "steps": 3,
        "save_every": 3,
    }
    path = tmp_path / "alone.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_clip_teaches_without_questions(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = capipe("train", alone, "--out", out)
    assert "8 images, 0 left out; 0 to validate on" in done.stdout and "preflight: clip: generic" in done.stdout
    logged = steps(out)
    assert len(logged) == 3 and all(-1 <= line["reward/clip"] == line["reward"] <= 1 for line in logged)
    assert (out / "step-000003/model.safetensors").exists()
    assert "images" in json.loads((out / "run.json").read_text())
    capipe("train", alone, "--out", out)  # all done: nothing is done again, the preflight no more than a step
    assert steps(out) == logged
    capipe("train", alone, "--out", tmp_path / "again")  # nor does it matter which captions ended at the same time
    assert steps(tmp_path / "again") == logged
    assert weights(tmp_path / "again/step-000003") == weights(out / "step-000003")
    quiz = ("--set", "rewards=[{kind: quiz}]")
    assert "a quiz asks questions" in one_line(capipe("train", alone, "--out", tmp_path / "other", *quiz, code=2))
    reader = ("--set", "rewards.0.model=tiny/reader")
    assert "tiny/reader" in one_line(capipe("train", alone, "--out", tmp_path / "other", *reader, code=2))


@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
async def test_all_rewards_of_both_papers_at_once(alone: Path, tmp_path: Path) -> None:
    """With a critic, so that penalties of tokens enter the returns."""
    drawn = {"model": str(diffusion(tmp_path / "sd")), "features": str(vgg_net(tmp_path / "vgg"))}
    rewards = [
        {"kind": "itm", "model": "tiny/itm", "weight": 0.1},
        {"kind": "blip", "model": str(blip_retrieval(tmp_path / "blip"))},
        {"kind": "naturalness", "model": str(opt(tmp_path / "opt")), "weight": 0.05},
        {"kind": "phrases", "phrases": ["a"], "weight": 0.05},
        {"kind": "repeats", "n": 1, "weight": 0.05},
        {"kind": "reconstruction", **drawn, "samples": 2, "steps": 1, "guidance": 1.0},
    ]
    sets = [f"rewards={json.dumps(rewards)}", "algorithm.loss=a2c", "algorithm.critic={}", "steps=2", "save_every=2"]
    said: list[str] = []
    last = await run_training(load_recipe(alone, sets), tmp_path / "run", fresh=False, say=said.append)
    assert weights(last)
    for line in steps(tmp_path / "run"):
        assert {f"reward/{reward['kind']}" for reward in rewards} | {"reward/reconstruction_se"} <= set(line)
        assert line["reward/reconstruction_se"] > 0 >= line["reward/repeats"] and line["unscored"] == 0
    for reward in rewards:
        assert any(each.startswith(f"preflight: {reward['kind']}: generic") for each in said)
    for entry in map(json.loads, (tmp_path / "run/captions.jsonl").read_text().splitlines()):
        total = sum(float(str(reward.get("weight", 1.0))) * entry["components"][reward["kind"]] for reward in rewards)
        assert entry["score"] == pytest.approx(total)


@pytest.mark.parametrize("name", ["tiny-vlrm", "tiny-vlrm-rs", "tiny-retrieval-ppo", "tiny-diffusion-ppo"])
def test_the_other_systems_train_at_the_bundled_models_scale(name: str, training_data: Path, tmp_path: Path) -> None:
    """Two small steps of each recipe as it is bundled; the checkpoint captions."""
    if name == "tiny-diffusion-ppo" and not (find_spec("diffusers") and is_bundled("diffusion")):
        pytest.skip("diffusers or the weights of tiny/diffusion are not here")
    shards = training_data / "train/shards"
    sets = (f"data.shards={shards}", "data.images=3", "rollout.images=2", "rollout.group=2", "steps=2", "save_every=2")
    out = tmp_path / "run"
    capipe("train", name, "--out", out, *(word for each in sets for word in ("--set", each)))
    logged, kinds = steps(out), [reward.kind for reward in load_recipe(Path(name)).rewards]
    assert len(logged) == 2
    for line in logged:
        assert {f"reward/{kind}" for kind in kinds} <= set(line) and line["unscored"] == 0
        assert line["kl"] >= 0 and line["value_loss"] > 0
    assert logged[0]["kl"] < 1e-6 < logged[1]["kl"]  # held to the model that it was
    assert (out / "step-000002/critic/value_head.safetensors").exists()
    model = ("--model", out / "step-000002", "--engine", "transformers", "--max-tokens", 40)
    capipe("annotate", "--shards", shards, "--out", tmp_path / "captions", *model)
    assert {row["status"] for row in table(tmp_path / "captions")} <= {"ok", "filtered"}


@pytest.mark.parametrize("name", ["tiny-best-of-n", "tiny-sft"])
def test_captions_are_imitated_by_the_bundled_recipes(name: str, training_data: Path, tmp_path: Path) -> None:
    """Two small steps of each recipe as it is bundled; the checkpoint captions."""
    shards, held = training_data / "train/shards", training_data / "held"
    sets = [f"data.shards={shards}", f"validation.shards={held / 'shards'}", f"validation.questions={held / 'qa'}"]
    sets += ["rollout.images=3", "steps=2", "save_every=2", "optimizer.warmup=0"]
    annotate = ("--engine", "transformers", "--max-tokens", 60)
    if name == "tiny-sft":
        prompts = ("--prompt", "dense", "--prompt", "short")
        given = ("--shards", shards, "--out", tmp_path / "given", "--model", "tiny/captioner", "--max-tokens", 200)
        capipe("annotate", *given, "--engine", "transformers", *prompts)
        sets.append(f"data.captions={tmp_path / 'given'}")
    else:
        sets += [f"data.questions={training_data / 'train/qa'}", "rollout.group=3"]
    out, flags = tmp_path / "run", [word for each in sets for word in ("--set", each)]
    done = capipe("train", name, "--out", out, *flags)
    logged = [line for line in steps(out) if "loss" in line]
    assert len(logged) == 2 and all(line["loss"] > 0 and line["unscored"] == 0 for line in logged)
    if name == "tiny-sft":
        assert "8 images with captions, 0 without; 4 to validate on" in done.stdout and "step 2/2 loss " in done.stdout
        assert not (out / "captions.jsonl").exists() and all(line["reward"] is None for line in logged)
        assert "captions" in json.loads((out / "run.json").read_text())
        other = ("--set", "data.prompt_name=short")
        assert "data.prompt_name" in one_line(capipe("train", name, "--out", out, *flags, *other, code=2))
    else:
        entries = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
        for step in (0, 1):
            groups: dict[str, list[tuple[float, float]]] = {}
            for entry in (entry for entry in entries if entry["step"] == step):
                groups.setdefault(entry["key"], []).append((entry["advantage"], entry["score"]))
            for captions in groups.values():
                chosen = [score for advantage, score in captions if advantage]
                assert chosen in ([], [max(score for _, score in captions)])
    capipe("annotate", "--shards", shards, "--out", tmp_path / "captions", "--model", out / "step-000002", *annotate)
    assert {row["status"] for row in table(tmp_path / "captions")} <= {"ok", "filtered"}


def test_a_reward_and_a_loss_of_the_users_own_train(alone: Path, tmp_path: Path) -> None:
    """As they stand in docs/extending.md."""
    (reward,), (loss,) = EXAMPLES["A reward"], EXAMPLES["A loss"]
    (tmp_path / "my_rewards.py").write_text(reward)
    (tmp_path / "my_losses.py").write_text(loss)
    rewards = [{"kind": "my_rewards:ColorReward", "enough": 4, "weight": 2.0}, {"kind": "length"}]
    sets = [f"rewards={json.dumps(rewards)}", "algorithm.loss=my_losses:spo", "algorithm.epochs=2", "steps=2"]
    flags = [word for each in sets for word in ("--set", each)]
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    out = tmp_path / "run"
    done = capipe("train", alone, "--out", out, *flags, **path)
    assert "preflight: my_rewards:ColorReward: generic 0.000" in done.stdout
    for line in steps(out):
        assert line["skipped"] is None and 0 <= line["reward/my_rewards:ColorReward"] <= 1
    entries = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert all("colors" in entry["details"]["my_rewards:ColorReward"] for entry in entries)
    assert set(json.loads((out / "run.json").read_text())["code"]) == {"my_rewards:ColorReward", "my_losses:spo"}
    (tmp_path / "my_losses.py").write_text(loss + "\nchanged = True\n")
    assert "code.my_losses:spo: " in one_line(capipe("train", alone, "--out", out, *flags, code=2, **path))
    missing = one_line(capipe("train", alone, "--out", tmp_path / "other", *flags, code=2))
    assert "rewards.0: my_rewards:ColorReward: there is no module my_rewards; install it" in missing
