"""Nothing is lost: an error in a step, a signal, tied groups; and the best checkpoint is kept."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from capipe.errors import BadInput, RunFailed
from capipe.models.engines.base import EngineDead
from capipe.models.tiny.world.corpus import write_corpus
from capipe.pipeline.jobs.train import run_training
from capipe.trainer import loop
from capipe.trainer.checkpoint import checkpoints
from capipe.trainer.evaluation.validation import Validation
from capipe.trainer.log import RunLog, read_best
from capipe.trainer.recipe import load_recipe
from capipe.trainer.sampling.rollouts import Rollout
from capipe.trainer.sampling.sampler import Sampler
from capipe.trainer.update import Updater

from ..conftest import capipe
from ..training import same_state, steps

ACCURACIES = [0.1, 0.3, 0.9, 0.5, 0.7]  # before the first step, and after each of four


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_corpus(folder / "corpus", 8, "train", 3)
    capipe("ingest", folder / "corpus", "--out", folder / "shards")
    return folder / "shards"


@pytest.fixture
def short(shards: Path, tmp_path: Path) -> Path:
    """Four short steps, rewarded by rules: many groups are tied."""
    settings: dict[str, Any] = {
        "model": "tiny/captioner",
        "prompt": "Describe the image.",
        "data": {"shards": str(shards)},
        "rewards": [{"kind": "phrases", "phrases": ["red", "blue", "top"]}],
        "rollout": {"images": 2, "group": 3, "max_tokens": 24},
        "algorithm": {"loss": "dr_grpo"},
        "alarms": {"truncated": 1},
        "optimizer": {"lr": 1e-4, "warmup": 1},
        "steps": 4,
        "save_every": 4,
        "preflight": False,
    }
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


async def train(recipe: Path, out: Path, *changes: str) -> tuple[Path, list[str]]:
    said: list[str] = []
    return await run_training(load_recipe(recipe, changes), out, fresh=False, say=said.append), said


def same(out: Path, whole: Path) -> bool:
    """Whether two runs have the same last weights, optimizer, captions and metrics."""
    files = ("captions.jsonl", "step-000004/model.safetensors")
    logs = [sorted((out / "steps.jsonl").read_text().splitlines()) for out in (out, whole)]
    last = [run / "step-000004" for run in (out, whole)]
    alike = all((out / file).read_bytes() == (whole / file).read_bytes() for file in files)
    return logs[0] == logs[1] and alike and same_state(*last)


def on_call(number: int, original: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """``original``, before whose call ``number`` (from 1) something happens."""
    calls = iter(range(1, 1000))

    def called(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            act()
        return original(*arguments, **options)

    return called


def raises(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


async def test_a_signal_in_a_step_ends_it_with_a_checkpoint_from_which_the_run_goes_on_exactly(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await train(short, tmp_path / "whole")
    kill = on_call(2, Updater.update, lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(Updater, "update", kill)
    last, said = await train(short, tmp_path / "parts")
    assert last.name == "step-000002" and "stopped after step 2 of 4; run the same command to go on" in said
    await train(short, tmp_path / "parts")
    assert same(tmp_path / "parts", tmp_path / "whole")


# Where it fails, in which call; the checkpoint that is kept, and what is said.
PLACES: list[tuple[type, str, int, Exception, int, str]] = [
    (Updater, "_losses", 3, RuntimeError("out of\nmemory"), 2, r"^step 3: RuntimeError: out of memory \(.*traceback\)"),
    (Rollout, "__init__", 3, ValueError("odd"), 2, r"^step 3: ValueError: odd"),
    (Rollout, "__init__", 3, EngineDead("vLLM has died"), 2, r"^vLLM has died; the same command goes on from"),
    (Sampler, "sync", 2, OSError(28, "No space left on device"), 2, r"^after step 2: OSError: .*No space left"),
    (RunLog, "captions", 3, OSError("disk"), 3, r"^after step 3: OSError: disk"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "name", "call", "error", "kept", "said"), PLACES)
async def test_an_error_in_a_step_keeps_the_last_whole_one(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    place: type, name: str, call: int, error: Exception, kept: int, said: str,
) -> None:  # fmt: skip
    rewards = ("rewards=[{kind: length, shape: longer, most: 30}]",)  # no group is tied, or a step has no loss
    await train(short, tmp_path / "whole", *rewards)
    out = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(place, name, on_call(call, getattr(place, name), raises(error)))
        with pytest.raises(RunFailed, match=said) as failed:
            await train(short, out, *rewards)
    line = str(failed.value)
    assert "\n" not in line and line.endswith(f"the same command goes on from {out}/step-{kept:06d}")
    assert [folder.name for folder in checkpoints(out)] == [f"step-{kept:06d}"]
    assert isinstance(error, EngineDead) or str(error).splitlines()[0] in (out / "failure.log").read_text()
    if name != "captions":  # what could not be logged is not
        await train(short, out, *rewards)
        assert same(out, tmp_path / "whole")


@pytest.mark.slow
async def test_weights_of_half_an_update_are_not_kept(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("algorithm.minibatches=2", "rewards=[{kind: length, shape: longer, most: 30}]", "save_every=1")
    monkeypatch.setattr(Updater, "step", on_call(4, Updater.step, raises(ValueError("odd"))))
    with pytest.raises(RunFailed, match=r"^step 2: ValueError: odd .*goes on from .*step-000001$"):
        await train(short, tmp_path / "run", *changes)
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000001"]
    monkeypatch.undo()
    monkeypatch.setattr(Updater, "update", on_call(1, Updater.update, raises(BadInput("the prompt is too long"))))
    with pytest.raises(BadInput, match=r"^the prompt is too long$"):  # an error for users stays what it is
        await train(short, tmp_path / "other", *changes)
    assert not checkpoints(tmp_path / "other")


def validated(recipe: Path, data: Path) -> list[str]:
    held = {"shards": str(data / "held/shards"), "questions": str(data / "held/qa"), "engine": "transformers"}
    return [f"validation={json.dumps({**held, 'every': 1})}", "save_every=10"]


def graded(accuracies: Sequence[float]) -> Callable[..., Any]:
    """Validations of these results, one after the other."""
    left = iter(accuracies)

    async def validate(*arguments: object) -> Validation:
        return Validation(next(left), None, None, 5.0, 0.0, 0.0, 4, 0)

    return validate


@pytest.mark.slow
async def test_the_best_checkpoint_is_kept_and_named(
    short: Path, training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, out = validated(short, training_data), tmp_path / "run"
    monkeypatch.setattr(loop, "validate", graded(ACCURACIES))
    _, said = await train(short, out, *changes)
    assert said[-2] == "best checkpoint: step-000002 (validation accuracy 0.900)"
    assert [folder.name for folder in checkpoints(out)] == ["step-000001", "step-000002", "step-000004"]
    best = read_best(out)
    assert best is not None and (best.step, best.metric, best.value) == (2, "accuracy", 0.9)

    parts = tmp_path / "parts"
    monkeypatch.setattr(loop, "validate", on_call(4, graded(ACCURACIES), raises(ValueError("odd"))))
    with pytest.raises(RunFailed, match=r"after step 3: ValueError: odd .*goes on from .*step-000003$"):
        await train(short, parts, *changes)
    monkeypatch.setattr(loop, "validate", graded(ACCURACIES[3:]))
    _, said = await train(short, parts, *changes)  # the validation that failed is made first
    assert same(parts, out) and read_best(parts) == best and said[-2].startswith("best checkpoint: step-000002 ")
    monkeypatch.setattr(loop, "validate", graded(ACCURACIES))
    _, said = await train(short, tmp_path / "ahead", *changes, "rollout.overlap=true", "save_every=3")
    assert said[-2].startswith("best checkpoint: step-000004 ")  # of those that there are anyway
    (parts / "best.json").unlink()
    _, said = await train(short, parts, *changes)  # and nothing when all is done
    assert not [line for line in said if line.startswith("validation after")] and "step-000002" in said[-2]


def captions(out: Path) -> list[dict[str, Any]]:
    files = sorted(out.glob("captions*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
async def test_tied_groups_are_refilled_and_a_stopped_run_goes_on_to_the_same_weights(
    short: Path, tmp_path: Path, overlap: bool
) -> None:
    """N + N steps are 2 N steps, to the last bit of weights, metrics and captions."""
    changes = ("rollout.refill=2", "save_every=2", f"rollout.overlap={str(overlap).lower()}")
    _, said = await train(short, tmp_path / "whole", *changes)
    logged = steps(tmp_path / "whole")
    assert sum(line["refilled"] for line in logged) > 0 and any(" refilled " in line for line in said)
    for line in logged:
        mine = [entry for entry in captions(tmp_path / "whole") if entry["step"] == line["step"]]
        replaced = [entry for entry in mine if entry.get("replaced")]
        assert len(mine) - len(replaced) == 2 * 3 and len(replaced) == 3 * line["refilled"]
        for key in {entry["key"] for entry in replaced}:  # they were tied
            assert len({entry["score"] for entry in replaced if entry["key"] == key}) == 1

    def stops(line: str) -> None:
        if line.startswith("step 3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await run_training(load_recipe(short, changes), tmp_path / "parts", fresh=False, say=stops)
    await train(short, tmp_path / "parts", *changes)
    assert same(tmp_path / "parts", tmp_path / "whole")


PLUGINS = """
import os
from capipe.models.engines.base import EngineDead
from capipe.trainer.losses import PolicyLoss, policy_gradient
from capipe.trainer.rewards.base import Scored

SECOND = os.environ.get("RANK") == "1"
calls = []


class Dies:
    def __init__(self, config): ...

    async def score(self, example, caption, sample_id):
        if SECOND and sample_id.split("/")[1] == "2":
            raise EngineDead("this engine is gone")
        return Scored(float(len(caption.token_ids)))

    async def aclose(self): ...


def fails(tokens, clip):
    calls.append(tokens)
    if SECOND and len(calls) == 3:
        raise ValueError("odd tokens")
    return policy_gradient(tokens, clip)


odd = PolicyLoss(fails, "token")
"""


def torchrun(tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    (tmp_path / "plugins_that_fail.py").write_text(PLUGINS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, "-m", "capipe.pipeline", "train", *map(str, words)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rewards=[{kind: 'plugins_that_fail:Dies'}]", "this engine is gone"),
        ("algorithm.loss=plugins_that_fail:odd", "step 3: ValueError: odd tokens"),
    ],
)
def test_an_error_in_one_process_ends_all_with_a_checkpoint(
    short: Path, tmp_path: Path, change: str, said: str
) -> None:
    sets = ("rewards=[{kind: length, shape: longer, most: 30}]", change)
    done = torchrun(tmp_path, short, "--out", tmp_path / "run", *(word for each in sets for word in ("--set", each)))
    assert done.returncode != 0
    lines = [line.partition("capipe: ")[2] for line in done.stderr.splitlines() if "capipe: " in line]
    assert len(lines) == 2 and sum(line.startswith(said) for line in lines) == 1, done.stderr
    assert sum(line.startswith("another process failed and says why") for line in lines) == 1
    assert all(line.endswith("the same command goes on from " + str(tmp_path / "run/step-000002")) for line in lines)
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000002"]


@pytest.mark.slow
async def test_two_processes_refill_with_the_images_of_one(short: Path, tmp_path: Path) -> None:
    changes = ("rollout.refill=3", "rollout.images=4", "steps=1", "save_every=1")
    await train(short, tmp_path / "one", *changes)
    flags = [word for each in changes for word in ("--set", each)]
    done = await asyncio.to_thread(torchrun, tmp_path, short, "--out", tmp_path / "two", *flags)
    assert done.returncode == 0, done.stderr
    one, two = (
        sorted((entry["key"], entry["caption"], entry.get("replaced", False)) for entry in captions(tmp_path / run))
        for run in ("one", "two")
    )
    assert one == two and any(replaced for *_, replaced in one)
    assert steps(tmp_path / "one")[0]["refilled"] == steps(tmp_path / "two")[0]["refilled"] > 0
