"""Weights handed to an engine: which, in which type, in which order with its sleep, sharded or not; and the check."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from capipe.errors import BadInput
from capipe.models.engines.base import Completion, EngineDead
from capipe.models.engines.vllm.weight_sync import FROZEN, LEARNING, Precision, Trained, read_weights
from capipe.trainer.build import freeze
from capipe.trainer.distributed import ALONE, Distributed, join
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.policy.fsdp import shard
from capipe.trainer.policy.lora import LoRAConfig, insert_adapter, merged_weights
from capipe.trainer.policy.weights import learning_names, weight_shapes, whole_weights
from capipe.trainer.recipe_sections import RolloutConfig, TrainedConfig
from capipe.trainer.sampling.sampler import Sampler, Sleeper
from capipe.trainer.sampling.weight_sync_check import WeightSyncCheck, tolerance
from capipe.trainer.sampling.weight_transfer import folder as folder_transfer
from capipe.trainer.sampling.weight_transfer.base import PolicyModel
from capipe.trainer.sampling.weight_transfer.direct import DirectTransfer, refuse_direct
from capipe.trainer.sampling.weight_transfer.folder import FolderTransfer
from capipe.trainer.update import UpdateConfig, Updater

from ..policies import IMAGE, groups, random_model
from ..test_update import SCORES, scored

FAMILY = "qwen2.5"
HALF = Precision("bfloat16", "bfloat16")
WAKING_CACHE = ("collect", "empty_cache", "wake kv_cache")


class Recording:
    """An engine of which only what is asked is kept."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    async def precision(self) -> Precision:
        return HALF

    async def reload(self, folder: Path, everything: bool = True) -> None:
        self.calls.append(f"reload {'all' if everything else 'learning'}")

    async def weight_update(self, command: str, **arguments: Any) -> None:
        self.calls.append(command)

    async def forget(self) -> None:
        self.calls.append("forget")

    async def sleep(self) -> None:
        self.calls.append("sleep")

    async def wake(self, part: str) -> None:
        self.calls.append(f"wake {part}")


def language_model_learns() -> Any:
    model = random_model(FAMILY)
    freeze(model, TrainedConfig())
    return model


def transfer_to(folder: Path, model: Any, calls: list[str]) -> FolderTransfer:
    return FolderTransfer(PolicyModel(model, HALF), Recording(calls), ALONE, folder, shared=False)


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_a_frozen_tower_is_not_among_what_learns() -> None:
    model = language_model_learns()
    names, shapes = learning_names(model), weight_shapes(model)
    assert names == {name for name in shapes if ".visual." not in name} and len(shapes) > len(names)
    for chosen in (names, frozenset(shapes)):
        yielded = list(whole_weights(model, chosen, torch.bfloat16))
        assert [name for name, _ in yielded] == [name for name in shapes if name in chosen]
        assert all(weight.shape == shapes[name] and weight.dtype == torch.bfloat16 for name, weight in yielded)


def test_an_adapter_is_merged_and_sent_with_its_neighbours() -> None:
    pytest.importorskip("peft")
    model = random_model(FAMILY)
    config = LoRAConfig(rank=3, targets=("q_proj", "up_proj"))
    freeze(model, TrainedConfig(lora=config))
    insert_adapter(model, config, "start", 0)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_()
    names = learning_names(model)
    matrices = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-2] for name in names} == {*matrices}
    assert "model.language_model.layers.1.self_attn.k_proj.bias" in names  # an engine has it beside the queries'
    merged = dict(merged_weights(model))
    sent = dict(whole_weights(model, names))
    assert sent.keys() == names and all(torch.equal(sent[name], merged[name]) for name in names)
    start = dict(random_model(FAMILY).named_parameters())
    moved = {name.split(".")[-2] for name in names if not torch.equal(sent[name], start[name])}
    assert moved == {"q_proj", "up_proj"}


async def test_frozen_weights_are_written_once_and_the_rest_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_transfer, "LARGEST_FILE", 4000)
    (tmp_path / "learning-00099.safetensors").write_text("of an earlier run")
    (tmp_path / "model.safetensors").write_text("of somebody else")
    model, calls = language_model_learns(), list[str]()
    transfer = transfer_to(tmp_path, model, calls)
    await transfer.prepare(everything=False)
    assert not list(tmp_path.glob(FROZEN)) and "learning-00099.safetensors" not in times(tmp_path)
    await transfer.prepare(everything=True)
    before = times(tmp_path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    await transfer.prepare(everything=True)
    after = times(tmp_path)
    assert before.keys() == after.keys() and len(list(tmp_path.glob(LEARNING))) > 2
    assert {name for name in before if before[name] == after[name]} == {
        "model.safetensors",
        *(file.name for file in tmp_path.glob(FROZEN)),
    }
    files = [load_file(file) for pattern in (FROZEN, LEARNING) for file in tmp_path.glob(pattern)]
    assert sum(map(len, files)) == len(weight_shapes(model))  # each in one file
    written = dict(read_weights(tmp_path, everything=True))
    assert written.keys() == weight_shapes(model).keys()
    assert {weight.dtype for weight in written.values()} == {torch.bfloat16}
    assert all(torch.equal(written[name], weight) for name, weight in PolicyModel(model, HALF).read(everything=False))
    assert dict(read_weights(tmp_path, everything=False)).keys() == learning_names(model)


async def test_the_allocators_cache_is_emptied_before_vllm_wakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[str]()
    model = language_model_learns()
    policy = DecoderPolicy(model, [IMAGE])
    learning = [weight for weight in policy.parameters() if weight.requires_grad]
    updater = Updater(policy, torch.optim.SGD(learning, lr=0.01), UpdateConfig())

    def emptied() -> None:
        assert all(weight.grad is None for weight in policy.parameters())
        calls.append("empty_cache")

    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    monkeypatch.setattr(gc, "collect", lambda: calls.append("collect"))
    engine: Any = Recording(calls)
    assert isinstance(engine, Trained) and isinstance(engine, Sleeper)
    sampler = Sampler(
        engine, ALONE, transfer=transfer_to(tmp_path, model, calls), sleeps=True, device=torch.device("cuda", 0)
    )
    await sampler.sync(0)  # awake since its start, with all weights
    assert calls == ["collect", "empty_cache", "wake weights", "reload learning", *WAKING_CACHE]
    calls.clear()
    await sampler.rest()
    updater.update(scored(policy, SCORES))
    await sampler.sync(1)
    assert calls == ["sleep", "collect", "empty_cache", "wake weights", "reload all", *WAKING_CACHE]
    calls.clear()
    sampler.sleeps = False
    await sampler.rest()
    await sampler.sync(2)
    assert calls == ["reload learning"]


def test_the_tolerance_follows_from_the_types() -> None:
    exact = Precision("float32", "float32")
    assert tolerance(exact, None) == 1e-3
    assert tolerance(exact, torch.bfloat16) == tolerance(Precision("bfloat16", "float32"), None) == 0.1
    assert tolerance(HALF, torch.bfloat16) == 0.2


def test_direct_is_refused_where_it_cannot_work() -> None:
    direct = RolloutConfig(engine="vllm", sync="direct")
    with pytest.raises(BadInput, match=r"rollout\.sync direct: .* the policy is on the cpu; set rollout\.sync: folder"):
        refuse_direct(direct, torch.device("cpu"))
    refuse_direct(RolloutConfig(engine="vllm"), torch.device("cpu"))
    for wrong in ({"engine": "transformers"}, {"engine": "vllm", "sync_folder": "/shared"}):
        with pytest.raises(ValueError, match="direct is for engine vllm and servers"):
            RolloutConfig(sync="direct", **wrong)  # type: ignore[arg-type]


class Sender:
    """What vLLM's trainer side is, to who calls it."""

    def __init__(self, calls: list[str], fails: bool = False) -> None:
        self.calls, self.fails, self.source = calls, fails, ""

    def send_weights(self) -> None:
        if self.fails:
            raise RuntimeError("NCCL error 5")
        self.calls.append(f"send {self.source}")


async def test_an_error_while_sending_is_the_engines_death() -> None:
    calls = list[str]()
    model = PolicyModel(language_model_learns(), HALF)

    def transfer(distributed: Distributed, fails: bool = False) -> DirectTransfer:
        return DirectTransfer(
            model, Recording(calls), Sender(calls, fails), "all", "learning", distributed, shared=True
        )

    with pytest.raises(EngineDead, match="took no new weights: RuntimeError: NCCL error 5"):
        await transfer(ALONE, fails=True).send(everything=False)
    assert calls == []
    await transfer(ALONE).send(everything=False)
    await transfer(Distributed(1, 2)).send(everything=True)
    assert calls == ["send learning", "forget", "send all"]  # caches are emptied by the first process alone


def check_of(policy: DecoderPolicy) -> tuple[WeightSyncCheck, Completion, float]:
    """The check of a policy, a text with other log-probabilities, and their distance from an untempered policy's."""
    group = groups(DecoderPolicy(random_model(FAMILY), [IMAGE]), FAMILY)[0]
    check = WeightSyncCheck(None, group.prompt, policy, 1e-3)  # type: ignore[arg-type]
    untempered = DecoderPolicy(random_model(FAMILY), policy.get_buffer("banned").tolist())
    plain = WeightSyncCheck(None, group.prompt, untempered, 1e-3)  # type: ignore[arg-type]
    tokens = group.completions[0].token_ids
    zeros = Completion("", tokens, "stop", len(tokens), (0.0,) * len(tokens))
    return check, zeros, plain.difference(zeros)


def test_the_policy_in_training_is_compared_without_its_temperature() -> None:
    policy = DecoderPolicy(random_model(FAMILY), [IMAGE, 3], temperature=0.5)
    check, zeros, expected = check_of(policy)
    assert check.difference(zeros) == pytest.approx(expected, abs=1e-9)
    assert policy.temperature == 0.5 and policy.get_buffer("banned").tolist() == [3, IMAGE]


def work(folder: str) -> None:
    """What each of the processes does that `torchrun` starts, with weights that are split."""
    distributed = join(sharded=True)
    model = language_model_learns()
    policy = DecoderPolicy(model, [IMAGE, 3], temperature=0.5)
    expected = dict(PolicyModel(random_model(FAMILY), HALF).read(everything=True))
    check, zeros, difference = check_of(policy)
    shard(policy)
    assert abs(check.difference(zeros) - difference) < 1e-9
    found = PolicyModel(model, HALF)
    assert {name: weight.shape for name, weight in expected.items()} == found.shapes
    transfer = FolderTransfer(found, Recording([]), distributed, Path(folder), shared=False)
    asyncio.run(transfer.prepare(everything=True))
    written = dict(read_weights(Path(folder), everything=True))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    dist.destroy_process_group()


@pytest.mark.slow
def test_split_weights_are_scored_and_sent_as_whole_ones(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "capipe.tests.trainer.sampling.test_weight_transfer", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    work(sys.argv[1])
