"""What a run writes down, and that a resumed one does not say things twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from capipe.errors import BadInput
from capipe.models.engines.base import Completion
from capipe.models.engines.hf.model_adapter import PreparedPrompt
from capipe.trainer.distributed import ALONE
from capipe.trainer.log import (
    BEST,
    CAPTIONS,
    TIMES,
    Best,
    RunLog,
    TensorBoard,
    WandB,
    best_validated,
    read_best,
    read_steps,
    write_best,
)
from capipe.trainer.metrics import UpdateMetrics
from capipe.trainer.policy.batch import Group, RewardResult
from capipe.trainer.recipe_sections import AlarmConfig
from capipe.trainer.step_metrics import raised_alarm, step_metrics


class Kept:
    def __init__(self) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self.written.append((step, dict(figures)))

    def close(self) -> None:
        self.closed = True


def test_figures_and_captions_are_lines(tmp_path: Path) -> None:
    sink = Kept()
    log = RunLog(tmp_path, 0, [sink])
    log.step(0, {"reward": 0.5, "skipped": None, "tokens": 3})
    group = Group("u", "k", None, [Completion("a star", (1, 2), "stop", 2)], [RewardResult(0.5, {"quiz": 0.5})])  # type: ignore[arg-type]
    group.advantages = torch.tensor([1.5])
    log.captions(0, [group])
    log.close()
    assert read_steps(tmp_path) == [{"step": 0, "reward": 0.5, "skipped": None, "tokens": 3}]
    assert sink.written == [(0, {"reward": 0.5, "tokens": 3.0})] and sink.closed
    entry = json.loads((tmp_path / CAPTIONS).read_text())
    assert (entry["caption"], entry["score"], entry["components"], entry["advantage"]) == (
        "a star",
        0.5,
        {"quiz": 0.5},
        1.5,
    )


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = RunLog(tmp_path, 0)
    for step in range(4):
        first.step(step, {"reward": step, "seconds/update": 1.5})
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # a kill in the middle of a line
    assert len(read_steps(tmp_path)) == 4
    again = RunLog(tmp_path, 2)
    again.step(2, {"reward": 9})
    assert [(each["step"], each["reward"]) for each in read_steps(tmp_path)] == [(0, 0), (1, 1), (2, 9)]
    assert [json.loads(line)["step"] for line in (tmp_path / TIMES).read_text().splitlines()] == [0, 1]


def test_captions_of_replaced_groups_are_marked(tmp_path: Path) -> None:
    captions = [Completion("a star", (1, 2), "stop", 2)] * 2
    groups = [Group(key, key, None, captions, [RewardResult(0.5)] * 2) for key in ("kept", "tied")]  # type: ignore[arg-type]
    groups[0].advantages = torch.tensor([1.5, -1.5])
    RunLog(tmp_path, 0).captions(0, groups[:1], groups[1:])
    entries = [json.loads(line) for line in (tmp_path / CAPTIONS).read_text().splitlines()]
    assert [(entry["key"], entry["advantage"], entry.get("replaced")) for entry in entries] == [
        ("kept", 1.5, None),
        ("kept", -1.5, None),
        ("tied", 0.0, True),
        ("tied", 0.0, True),
    ]


def test_the_best_checkpoint_is_the_first_of_the_best_validated_ones(tmp_path: Path) -> None:
    accuracies = {-1: 0.95, 4: 0.3, 9: 0.8, 14: 0.9, 19: 0.8}  # by the last completed step
    entries: list[dict[str, Any]] = [{"step": step, "validation/accuracy": each} for step, each in accuracies.items()]
    entries.append({"step": 24, "validation/failed": 4})
    assert best_validated(entries, [5, 10, 20, 25]) == Best(10, 0.8)  # no checkpoint after 15 steps, none before all
    assert best_validated(entries, [25]) is None and best_validated([], [5]) is None
    assert read_best(tmp_path) is None
    write_best(tmp_path, Best(10, 0.8))
    assert json.loads((tmp_path / BEST).read_text()) == {"step": 10, "metric": "accuracy", "value": 0.8}
    assert read_best(tmp_path) == Best(10, 0.8)
    for other in ("{", "[]", '{"step": "../x", "value": 1}', '{"step": 1, "value": 1, "more": 1}'):
        (tmp_path / BEST).write_text(other)
        assert read_best(tmp_path) is None


def test_a_run_that_starts_has_no_validation_of_an_earlier_one(tmp_path: Path) -> None:
    RunLog(tmp_path, 0).step(-1, {"validation/accuracy": 0.5})
    RunLog(tmp_path, 3)
    assert len(read_steps(tmp_path)) == 1
    RunLog(tmp_path, 0)
    assert read_steps(tmp_path) == []


def test_times_are_in_a_file_of_their_own(tmp_path: Path) -> None:
    """What two runs alike log differs in one file; curves show times all the same."""
    sink = Kept()
    for name, seconds in (("first", 1.0), ("second", 2.0)):
        log = RunLog(tmp_path / name, 0, [sink])
        log.step(-1, {"validation/plain": 0.5})
        log.step(0, {"reward": 0.5, "seconds/rollout": seconds, "seconds/update": 0.25})
    first, second = tmp_path / "first", tmp_path / "second"
    assert (first / "steps.jsonl").read_bytes() == (second / "steps.jsonl").read_bytes()
    assert "seconds" not in (first / "steps.jsonl").read_text()
    told = [json.loads(line) for line in (second / TIMES).read_text().splitlines()]
    assert told == [{"step": 0, "seconds/rollout": 2.0, "seconds/update": 0.25}]
    assert sink.written[-1] == (0, {"reward": 0.5, "seconds/rollout": 2.0, "seconds/update": 0.25})


def test_tensorboard_reads_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0, [TensorBoard(tmp_path / "tensorboard")])
    log.step(0, {"reward": 0.25, "skipped": None})
    log.step(1, {"reward": 0.5, "mismatch": 0.1})
    log.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(read.Tags()["scalars"]) == ["mismatch", "reward"]
    assert [(each.step, each.value) for each in read.Scalars("reward")] == [(0, 0.25), (1, 0.5)]


def test_wandb_keeps_figures_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: Any = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WandB("captions", "run", tmp_path, {"steps": 2, "model": "tiny/captioner"})
    assert wandb.run.config["model"] == "tiny/captioner" and wandb.run.project == "captions"
    sink.write(-1, {"validation/accuracy": 0.25})
    sink.write(0, {"reward": 0.5})
    assert sink._run.summary["reward"] == 0.5 and sink._run.summary["validation/accuracy"] == 0.25
    sink.close()
    written = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 1 and written[0].stat().st_size > 0 and wandb.run is None


@pytest.mark.parametrize(("module", "mend"), [("wandb", r"capipe\[log\]"), ("tensorboard", "pip install tensorboard")])
def test_a_log_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, mend: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput, match=mend):
        if module == "wandb":
            WandB("captions", "run", tmp_path, {})
        else:
            TensorBoard(tmp_path)


def figures(**changed: float | str) -> dict[str, Any]:
    shares = {"kl": 0.0, "tokens_per_caption": 10.0, "truncated": 0.0, "repeating": 0.0, "unscored_share": 0.0}
    return {**shares, "captions": 9, "captions_failed": 0, "failure": None, **changed}


def test_a_step_whose_captions_all_fail_is_an_alarm_of_its_own_at_once() -> None:
    config = AlarmConfig()
    said = raised_alarm(figures(captions=0, captions_failed=6, failure="no template"), config, {})
    assert said == "all 6 captions of the step failed: no template"
    assert raised_alarm(figures(captions=5, captions_failed=1, failure="too long"), config, {}) is None


def test_captions_that_fail_are_counted_with_the_first_reason() -> None:
    prompt = PreparedPrompt(torch.arange(4), torch.arange(4)[None], 4, None)
    groups = [Group("a", "one", prompt), Group("b", "two", prompt, failures=["no template", "too long"])]
    found = step_metrics(groups, UpdateMetrics(*[0.0] * 7, tokens=0, tied=0, unscored=0), [], ALONE)
    assert (found["captions"], found["captions_failed"], found["failure"]) == (0, 2, "no template")


def test_an_alarm_ends_a_run_that_diverges_for_some_steps_in_a_row() -> None:
    config, counts = AlarmConfig(truncated=0.5, patience=2, kl=5.0), dict[str, int]()
    assert raised_alarm(figures(truncated=0.6), config, counts) is None
    assert raised_alarm(figures(), config, counts) is None  # it has come back
    assert raised_alarm(figures(truncated=0.6), config, counts) is None
    said = raised_alarm(figures(truncated=0.7), config, counts)
    assert said == "0.70 of the captions are cut at their limit (alarms.truncated: 0.5), 2 steps in a row"
    wrong = {"kl": (0.6, "nats"), "repeating": (0.9, "loop"), "unscored_share": (0.9, "no score")}
    wrong["mismatch"] = (0.5, r"alarms.mismatch: 0.3")
    for name, (value, words) in wrong.items():
        counts = {}
        raised_alarm(figures(**{name: value}), config, counts)
        assert words in (raised_alarm(figures(**{name: value}), config, counts) or "")
