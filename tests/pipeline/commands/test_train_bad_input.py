"""What goes wrong in the data or in a reward costs no more than it must, and is said in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import ArtifactMismatch, BadInput, RunFailed
from capipe.models.bundled import folder_of
from capipe.models.engines.base import Completion, RequestError
from capipe.pipeline.jobs.train import run_training
from capipe.trainer.dataset import Example
from capipe.trainer.recipe import load_recipe
from capipe.trainer.rewards.base import Scored
from capipe.trainer.rewards.quiz import QuizReward

from ..conftest import capipe
from ..training import steps, weights

pytestmark = pytest.mark.slow

SHORT = ("steps=3", "rollout.images=2", "validation=null", "preflight=false", "save_every=3", "rewards.1.weight=0")


async def train(recipe: Path, out: Path, *changes: str) -> tuple[Path, list[str]]:
    said: list[str] = []
    loaded = load_recipe(recipe, [*SHORT, *changes])
    return await run_training(loaded, out, fresh=False, say=said.append), said


async def test_questions_without_their_images_are_refused(recipe: Path, training_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactMismatch, match="it was not made of these shards"):
        await train(recipe, tmp_path / "run", f"data.shards={training_data / 'held/shards'}")
    assert not list((tmp_path / "run").glob("step-*"))


async def test_images_without_questions_are_counted_and_left_out(
    recipe: Path, training_data: Path, tmp_path: Path
) -> None:
    lines = (training_data / "train/set.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    wrong = json.dumps({**first, "answer": next(each for each in first["options"] if each != first["answer"])})
    screen = ("--screen", "strict", "--screen-model", "tiny/teacher", "--screen-engine", "transformers")
    for name, kept, how in (  # three questions an image: four of eight; and one that the screen rejects
        ("some", lines[:12], ("--screen", "none")),
        ("none", [wrong], screen),
    ):
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(kept))
        source = ("--import", tmp_path / f"{name}.jsonl", *how)
        capipe("qa", "--shards", training_data / "train/shards", "--out", tmp_path / name, *source)
    _, said = await train(recipe, tmp_path / "run", f"data.questions={tmp_path / 'some'}", "steps=1", "save_every=1")
    assert "4 images with questions, 4 without; 0 to validate on" in said
    with pytest.raises(BadInput, match="none of the 8 images has a question to ask"):
        await train(recipe, tmp_path / "other", f"data.questions={tmp_path / 'none'}")


def failing(monkeypatch: pytest.MonkeyPatch, fails: Any) -> None:
    """The quiz raises where ``fails`` says so of a caption's name."""
    score = QuizReward.score

    async def scored(self: QuizReward, example: Example, caption: Completion, sample_id: str) -> Scored:
        if fails(sample_id):
            raise RequestError("the reader timed out")
        return await score(self, example, caption, sample_id)

    monkeypatch.setattr(QuizReward, "score", scored)


async def test_captions_that_cannot_be_scored_are_left_out(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda sample_id: sample_id.endswith("/0"))
    out = tmp_path / "run"
    await train(recipe, out)
    assert [line["unscored"] for line in steps(out)] == [2, 2, 2]  # one of three captions of each of two images
    for entry in map(json.loads, (out / "captions.jsonl").read_text().splitlines()):
        if entry["score"] is None:
            assert entry["advantage"] == 0 and "timed out" in entry["details"]["quiz"]["error"]


async def test_a_run_without_any_score_ends_with_a_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda sample_id: True)
    out = tmp_path / "run"
    with pytest.raises(RunFailed, match=r"1\.00 of the captions have no score \(alarms\.unscored: 0\.5\), 2 steps"):
        await train(recipe, out, "alarms.patience=2")
    assert (out / "step-000002/model.safetensors").exists()
    assert all(line["skipped"] == "no group has scores that differ" for line in steps(out))


async def test_equal_rewards_teach_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def same(self: QuizReward, example: Example, caption: Completion, sample_id: str) -> Scored:
        return Scored(0.5)

    monkeypatch.setattr(QuizReward, "score", same)
    out = tmp_path / "run"
    last, _ = await train(recipe, out, "save_every=1")
    assert all(line["tied"] == 2 and line["skipped"] for line in steps(out))
    assert weights(last) == weights(out / "step-000001")


async def test_a_model_with_a_sliding_window_is_refused_in_a_line(recipe: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in folder_of("captioner").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    text = config.get("text_config", config)
    windows = ["sliding_attention", *["full_attention"] * (text["num_hidden_layers"] - 1)]
    text |= {"layer_types": windows, "use_sliding_window": True, "sliding_window": 64}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="has layers of sliding_attention, which the trainer's packing"):
        await train(recipe, tmp_path / "run", f"model={model}")
    assert not (tmp_path / "run").exists()


async def test_packing_is_tried_before_the_first_step(recipe: Path, tmp_path: Path) -> None:
    _, said = await train(recipe, tmp_path / "run", "steps=1", "save_every=1", "preflight=true")
    (told,) = [line for line in said if line.startswith("preflight: packed captions differ from plain ones by ")]
    assert float(told.split(" by ")[1].split()[0]) < 1e-3


async def test_rewards_by_another_activation_are_another_run(recipe: Path, tmp_path: Path) -> None:
    reward = ('rewards=[{"kind": "clip", "model": "tiny/clip"}]', "steps=1", "save_every=1")
    loaded = load_recipe(recipe, [*SHORT[:-1], *reward])
    await run_training(loaded, tmp_path / "run", fresh=False, say=lambda _: None)
    file = tmp_path / "run" / "run.json"
    before = json.loads(file.read_text())
    assert before["scorers"]["clip"]["activation"] == "gelu"
    before["scorers"]["clip"]["activation"] = "quick_gelu"
    file.write_text(json.dumps(before))
    with pytest.raises(ArtifactMismatch, match=r"scorers\.clip\.activation"):
        await run_training(loaded, tmp_path / "run", fresh=False, say=lambda _: None)
