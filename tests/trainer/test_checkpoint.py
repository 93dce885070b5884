"""Checkpoints appear whole or not at all, and belong to one recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from capipe.errors import ArtifactMismatch, BadInput
from capipe.trainer.checkpoint import FACTS, STATE, Facts, checkpoints, newest, optimizer_state, read_facts, save


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    state = {"exp_avg": torch.arange(3.0), "step": torch.tensor(4)}
    made = save(tmp_path, Facts(7, "mark", {"alarms": {"kl": 1}}), write, state)
    assert made.name == "step-000007" and (made / "model.safetensors").read_bytes() == b"weights"
    found = newest(tmp_path, "mark")
    assert found is not None and found[0] == made and found[1] == Facts(7, "mark", {"alarms": {"kl": 1}})
    back = optimizer_state(made)
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)
    assert newest(tmp_path / "elsewhere", "mark") is None


def test_a_restored_state_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW([{"params": [each], "scale": 1.0} for each in weights], betas=(0.9, 0.95))
    sum(each.sum() for each in weights).backward()
    optimizer.step()
    first = save(tmp_path / "first", Facts(1, "mark", {}), write, optimizer.state_dict())
    optimizer.load_state_dict(optimizer_state(first))
    again = save(tmp_path / "again", Facts(1, "mark", {}), write, optimizer.state_dict())
    assert (first / STATE).read_bytes() == (again / STATE).read_bytes()


def test_one_that_a_kill_left_half_written_is_not_read_and_goes(tmp_path: Path) -> None:
    save(tmp_path, Facts(1, "mark", {}), write, {})
    half = tmp_path / "step-000002.partial"
    write(half)

    def dies(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, Facts(3, "mark", {}), dies, {})
    found = newest(tmp_path, "mark")
    assert found is not None and found[1].step == 1
    save(tmp_path, Facts(3, "mark", {}), write, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, Facts(step, "mark", {}), write, {}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000010", "step-000011"]


def test_the_best_one_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, Facts(step, "mark", {}), write, {}, keep=2, best=1 if step < 11 else 10)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000010", "step-000011"]
    for step in (12, 13):
        save(tmp_path, Facts(step, "mark", {}), write, {}, keep=2, best=10)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000010", "step-000012", "step-000013"]


def test_another_recipe_does_not_go_on_from_it(tmp_path: Path) -> None:
    made = save(tmp_path, Facts(1, "mark", {}), write, {})
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
