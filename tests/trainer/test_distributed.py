"""Several processes give the gradients, and the steps, of one: replicated weights, split ones, and both by node."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from capipe.trainer.distributed import ALONE, Agreed, Distributed, alone_on, join
from capipe.trainer.losses import Correction
from capipe.trainer.metrics import UpdateMetrics
from capipe.trainer.policy.batch import Group, RewardResult, pack
from capipe.trainer.policy.critic import CriticConfig, ValueHead
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.policy.fsdp import copy_weights, optimizer_state, restore_optimizer, shard, whole
from capipe.trainer.policy.state import load_optimizer, load_weights, save_state, state_tensors
from capipe.trainer.update import UpdateConfig, Updater

from .policies import IMAGE, completion, groups, random_model

FAMILY = "qwen2.5"
SCORES: list[list[float | None]] = [[1.0, 0.0, 0.5], [0.2, 0.9], [0.3, None, 0.4], [0.1, 0.6]]
CONFIGS = {
    "grpo": UpdateConfig(max_norm=0.1, budget=1),
    "ppo": UpdateConfig(loss="ppo", critic=CriticConfig(weight=0.3), max_norm=1e9, epochs=2, budget=1),
    "corrected": UpdateConfig(
        correction=Correction("sequence_mask", 1.2), kl=0.1, kl_in="reward", entropy=0.01, max_norm=1e9, budget=1
    ),
}
STEPS = 2


def policy_of(config: UpdateConfig) -> DecoderPolicy:
    head = None if config.critic is None else ValueHead(32).double()
    return DecoderPolicy(random_model(FAMILY), [IMAGE], value_head=head)


def train(config: UpdateConfig, distributed: Distributed) -> tuple[DecoderPolicy, torch.optim.Optimizer, UpdateMetrics]:
    policy = policy_of(config)
    optimizer = placed(policy, distributed)
    frozen = DecoderPolicy(random_model(FAMILY, seed=5).requires_grad_(False), [IMAGE])
    updater = Updater(policy, optimizer, config, lambda batch: frozen(batch).logp, distributed)
    for _ in range(STEPS):
        report = updater.update(mine(policy, distributed))
    return policy, optimizer, report


def placed(policy: DecoderPolicy, distributed: Distributed) -> torch.optim.Optimizer:
    policy.base.visual.requires_grad_(False)
    if distributed.sharded:
        shard(policy, distributed.mesh)
    learning = [weight for weight in policy.parameters() if weight.requires_grad]
    return torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.1)


def mine(policy: DecoderPolicy, distributed: Distributed) -> list[Group]:
    """Three groups for the first of two processes, one for the second, which so has fewer micro-batches.

    All have images: whoever shares a split tower has to look as often as the others.
    """
    template = DecoderPolicy(random_model(FAMILY), [IMAGE])
    made = groups(template, FAMILY)[:3]
    made.append(Group("e", "e", made[1].prompt, [completion(4, 40), completion(6, 41)]))
    for number, (group, values) in enumerate(zip(made, SCORES, strict=True)):
        group.rewards = [RewardResult(value) for value in values]
        logp = template(pack([group])).logp.detach().split([len(each.token_ids) for each in group.completions])
        group.completions = [
            replace(each, logprobs=tuple((row - 0.1 * (number + place - 1)).tolist()))
            for place, (each, row) in enumerate(zip(group.completions, logp, strict=True))
        ]
    if distributed.count == 1:
        return made
    if distributed.count == 4:
        return made[distributed.rank :][:1]
    return made[:3] if distributed.first else made[3:]


def weights(policy: DecoderPolicy) -> dict[str, torch.Tensor]:
    return {name: whole(weight.detach()).clone() for name, weight in policy.named_parameters()}


def work(folder: str, name: str, sharded: bool) -> None:
    """What each of the processes does that `torchrun` starts."""
    distributed = join(sharded)
    nodes = int(os.environ["GROUP_WORLD_SIZE"])
    assert (distributed.mesh is None) == (nodes == 1)
    assert distributed.mesh is None or distributed.mesh.shape == (nodes, distributed.count // nodes)
    policy, optimizer, report = train(CONFIGS[name], distributed)
    found = weights(policy)
    state = optimizer_state(policy, optimizer)
    if distributed.first:
        torch.save(state, f"{folder}/state.pt")
    distributed.wait()
    restore_optimizer(policy, optimizer, torch.load(f"{folder}/state.pt", weights_only=True))  # as a resumed run does
    again = optimizer_state(policy, optimizer)
    copy = policy_of(CONFIGS[name])
    copy_weights(policy, copy.model)
    assert all(torch.equal(weight, found[f"model.{name}"]) for name, weight in copy.model.named_parameters())
    hand_over_states(Path(folder), CONFIGS[name], distributed, policy, optimizer)
    if distributed.first:
        torch.save({"weights": found, "state": state, "again": again, "report": report.__dict__}, f"{folder}/found.pt")
    dist.destroy_process_group()


def hand_over_states(
    folder: Path,
    config: UpdateConfig,
    distributed: Distributed,
    policy: DecoderPolicy,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write this run's state, each process its own shards; read that of the single process, which is the same."""
    state = state_tensors(policy, optimizer)
    kept = {name: whole(value).clone() for name, value in state.items()}
    if distributed.sharded or distributed.first:
        pending = save_state(folder / "several", state, distributed)
        with torch.no_grad():
            for weight in policy.parameters():
                weight.zero_()  # training goes on
        pending.result()
    distributed.wait()
    if distributed.sharded:
        held = sum(file.stat().st_size for file in (folder / "several").iterdir())
        sizes = sum(value.numel() * value.itemsize for value in kept.values())
        written = len(list((folder / "several").iterdir()))
        assert written == distributed.count // int(os.environ["GROUP_WORLD_SIZE"])
        assert sizes < held < 2 * sizes  # each shard once, and not once for each node
        local = sum(weight.to_local().numel() for weight in policy.parameters())  # what trainer/memory.py divides
        assert 0.9 < written * local / sum(weight.numel() for weight in policy.parameters()) < 1.1
    for source in ("one", "several"):
        other = policy_of(config)
        with torch.no_grad():
            for weight in other.parameters():
                weight.zero_()
        optimizer = placed(other, distributed)
        load_weights(folder / source, other)
        load_optimizer(folder / source, other, optimizer)
        found = {name: whole(value) for name, value in state_tensors(other, optimizer).items()}
        assert found.keys() == kept.keys()
        assert all(torch.allclose(found[name], kept[name], rtol=1e-6, atol=1e-9) for name in kept), source
        assert source == "one" or all(torch.equal(found[name], kept[name]) for name in kept)


def flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": value for name, entry in state["state"].items() for key, value in entry.items()}


def launch(folder: Path, name: str, sharded: bool, nodes: int) -> None:
    """Two processes on each of the nodes, each of which has a `torchrun` of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = ["-m", "capipe.tests.trainer.test_distributed", str(folder), name, str(int(sharded))]
    launched = []
    for node in range(nodes):
        places = ["--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", "2"]
        command = [sys.executable, "-m", "torch.distributed.run", *places, "--master-port", str(port), *worker]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launched.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment))
    try:
        for process in launched:
            errors = process.communicate(timeout=300)[1]
            assert process.returncode == 0, errors.decode()
    finally:
        for process in launched:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sharded", "nodes"),
    [
        ("grpo", False, 1),
        ("grpo", True, 1),
        ("ppo", False, 1),
        ("ppo", True, 1),
        ("ppo", True, 2),
        ("corrected", True, 1),
    ],
)
def test_several_processes_equal_one(tmp_path: Path, name: str, sharded: bool, nodes: int) -> None:
    policy, optimizer, report = train(CONFIGS[name], ALONE)
    alone, state = weights(policy), optimizer_state(policy, optimizer)
    save_state(tmp_path / "one", state_tensors(policy, optimizer), ALONE).result()
    launch(tmp_path, name, sharded, nodes)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["weights"].keys() == alone.keys()
    for key, weight in alone.items():
        assert torch.allclose(found["weights"][key], weight, rtol=0, atol=1e-9), key
    for key, value in flat(state).items():
        assert torch.allclose(flat(found["state"])[key].double(), value.double(), rtol=1e-6, atol=1e-9), key
        assert torch.equal(flat(found["again"])[key], flat(found["state"])[key])
    for key in ("loss", "norm", "entropy", "value_loss", "kl", "mismatch", "correction"):
        expected = getattr(report, key)
        assert found["report"][key] == (expected if expected is None else pytest.approx(expected, 1e-9, 1e-12)), key
    assert found["report"]["capped"] == report.capped and bool(report.capped) == (name == "corrected")
    again = policy_of(CONFIGS[name])
    placed(again, ALONE)
    load_weights(tmp_path / "several", again)
    assert all(torch.equal(weight, found["weights"][key]) for key, weight in weights(again).items())
    assert found["report"]["tokens"] == report.tokens and found["report"]["unscored"] == report.unscored


def test_shares_cover_a_step() -> None:
    shares = [Distributed(rank, 3).share(list(range(8))) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) == 1


class Peers(Distributed):
    """Two processes, of which the other one fails or not."""

    fails = False

    def most(self, value: int) -> int:
        return max(value, int(self.fails))


def test_an_error_of_one_process_is_raised_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    own, peers = ValueError("odd"), Peers(0, 2)
    with pytest.raises(ValueError, match="odd"), ALONE.agreed():
        raise own
    with pytest.raises(Agreed, match="odd") as raised, peers.agreed():
        raise own
    assert raised.value.error is own
    with peers.agreed():
        pass
    monkeypatch.setattr(Peers, "fails", True)
    with pytest.raises(Agreed, match="another process failed") as raised, peers.agreed():
        pass
    assert raised.value.error is None


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("4,6", "6"), ("", "1")])
def test_what_is_started_alone_has_one_gpu_and_no_peers(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    before = dict(os.environ)
    with alone_on(torch.device("cuda", 1)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
        assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"} & set(os.environ)
    assert dict(os.environ) == before


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], sys.argv[3] == "1")
