"""Checkpoints appear whole or not at all, and belong to one recipe."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from capipe.errors import ArtifactMismatch, BadInput, RunFailed
from capipe.models.engines.model_folder import resolve_model
from capipe.trainer import checkpoint
from capipe.trainer.checkpoint import (
    FACTS,
    OLDER_STATE,
    CheckpointWriter,
    Facts,
    checkpoints,
    newest,
    older_optimizer_state,
    read_facts,
    save,
)
from capipe.trainer.policy.critic import ValueHead
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.policy.fsdp import optimizer_state, restore_optimizer
from capipe.trainer.policy.state import load_optimizer, load_weights, state_of, state_tensors

from .policies import random_model

STATE = {"weight.a": torch.arange(3.0)}


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def model() -> DecoderPolicy:
    policy = DecoderPolicy(random_model("qwen2.5").float(), value_head=ValueHead(32))
    policy.base.visual.requires_grad_(False)
    return policy


def adam(policy: DecoderPolicy) -> torch.optim.Optimizer:
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    return torch.optim.AdamW([{"params": weights, "scale": 1.0}], lr=0.1, betas=(0.9, 0.95))


def step(policy: DecoderPolicy, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for weight in policy.parameters():
        weight.grad = torch.randn_like(weight) if weight.requires_grad else None
    optimizer.step()


def test_training_goes_on_while_its_state_is_written_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    policy = model()
    optimizer = adam(policy)
    step(policy, optimizer, 1)
    writer = CheckpointWriter(tmp_path)
    facts = Facts(7, "mark", {"alarms": {"kl": 1}})
    saved = {name: value.clone() for name, value in state_tensors(policy, optimizer).items()}
    made = writer.save(facts, state_tensors(policy, optimizer), write)
    step(policy, optimizer, 2)
    writer.finish()
    assert made.name == "step-000007" and (made / "model.safetensors").read_bytes() == b"weights"
    assert newest(tmp_path, "mark") == (made, facts) and newest(tmp_path / "elsewhere", "mark") is None
    again = model()
    other = adam(again)
    load_weights(made / "state", again)
    load_optimizer(made / "state", again, other)
    found = state_tensors(again, other)
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    assert not any("visual" in name for name in saved)  # frozen weights are the start's
    step(again, other, 2)
    assert all(torch.equal(*pair) for pair in zip(policy.parameters(), again.parameters(), strict=True))


def test_nothing_in_it_is_unpickled(tmp_path: Path) -> None:
    made = save(tmp_path, Facts(1, "mark", {}), None, STATE)
    assert {path.suffix for path in made.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    with pytest.raises(BadInput, match=r"no config.json; name the last or the best checkpoint"):  # it is no model
        resolve_model(str(made))


@pytest.mark.parametrize("damage", ["of others", "cut", "gone", "no tensors"])
def test_a_state_that_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    policy = model()
    made = save(tmp_path, Facts(1, "mark", {}), None, state_tensors(policy, adam(policy)))
    (file,) = (made / "state").iterdir()
    if damage == "of others":
        policy.value_head = ValueHead(32, hidden=5)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "gone":
        file.unlink()
    else:
        file.write_text("{}")
    with pytest.raises(BadInput, match=r"state: cannot be read, or is of another recipe .* the one before"):
        load_weights(made / "state", policy)


def test_the_state_of_an_older_checkpoint_is_read(tmp_path: Path) -> None:
    policy = model()
    optimizer = adam(policy)
    step(policy, optimizer, 1)
    torch.save({"optimizer": optimizer_state(policy, optimizer)}, tmp_path / OLDER_STATE)
    assert state_of(tmp_path) is None
    optimizer.zero_grad()
    other = adam(policy)
    restore_optimizer(policy, other, older_optimizer_state(tmp_path))
    found, saved = state_tensors(policy, other), state_tensors(policy, optimizer)
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


def test_one_that_a_kill_left_half_written_is_not_read_and_goes(tmp_path: Path) -> None:
    save(tmp_path, Facts(1, "mark", {}), write, STATE)
    (tmp_path / "step-000002.partial").mkdir()
    write(tmp_path / "step-000002.partial")

    def dies(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, Facts(3, "mark", {}), dies, STATE)
    found = newest(tmp_path, "mark")
    assert found is not None and found[1].step == 1
    save(tmp_path, Facts(3, "mark", {}), write, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def test_one_counts_when_its_state_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state: Future[None] = Future()
    monkeypatch.setattr(checkpoint, "save_state", lambda *arguments: state)
    writer = CheckpointWriter(tmp_path)
    made = writer.save(Facts(1, "mark", {}), STATE, write)
    assert not checkpoints(tmp_path) and (tmp_path / "step-000001.partial/model.safetensors").exists()
    state.set_result(None)
    writer.finish()
    assert checkpoints(tmp_path) == [made]
    state = Future()
    writer.save(Facts(2, "mark", {}), STATE, write)
    state.set_exception(OSError("no space left"))
    with pytest.raises(RunFailed, match=r"a checkpoint could not be written .no space left"):
        writer.finish()
    assert checkpoints(tmp_path) == [made]
    writer.finish()


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, Facts(step, "mark", {}), write, STATE, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000010", "step-000011"]


def test_the_best_is_kept_besides_them_and_noted_once_it_is_complete(tmp_path: Path) -> None:
    writer, noted = CheckpointWriter(tmp_path, keep=1), []
    for step in (1, 2, 3):
        writer.save(
            Facts(step, "mark", {}), STATE, write, best=1, then=lambda: noted.append(len(checkpoints(tmp_path)))
        )
    writer.finish()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001", "step-000003"]
    assert noted == [1, 2, 3]  # with the new one, before an old one goes


def test_another_recipe_does_not_go_on_from_it(tmp_path: Path) -> None:
    made = save(tmp_path, Facts(1, "mark", {}), write, STATE)
    with pytest.raises(ArtifactMismatch, match=r"another recipe.*--fresh"):
        newest(tmp_path, "other")
    (made / FACTS).write_text("{")
    with pytest.raises(BadInput, match=r"trainer\.json: cannot be read"):
        newest(tmp_path, "mark")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "7"},
        {"fingerprint": None},
        {"figures": []},
        {"figures": {"alarms": ["kl"]}},
        {"figures": {"alarms": {"kl": "x"}}},
        {"figures": {"reader": "tiny/reader"}},
        {"figures": {"reader": {"name": 1, "digest": None}}},
        {"figures": {"reader": {"name": "a", "digest": None, "more": 1}}},
        {"more": 1},
    ],
)
def test_facts_of_somebody_elses_making_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    sound = {"step": 7, "fingerprint": "mark", "figures": {"reader": {"name": "a", "digest": None}}}
    (tmp_path / FACTS).write_text(json.dumps(sound))
    assert read_facts(tmp_path).step == 7
    (tmp_path / FACTS).write_text(json.dumps(sound | change))
    with pytest.raises(BadInput, match="cannot be read"):
        read_facts(tmp_path)
