"""Weights sharded over the training processes (FSDP2), and gathered for sampling and saving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from .decoder import DecoderPolicy

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(policy: DecoderPolicy) -> None:
    """Shard the weights of ``policy`` over all processes, in place: each layer, then the rest as one unit."""
    for layer in layers_of(policy):
        fully_shard(layer)
    fully_shard(policy)


def layers_of(policy: DecoderPolicy) -> list[Any]:
    """Layers in the order of the forward pass: vision encoder, then decoder."""
    base = policy.base
    return [*base.visual.blocks, *base.language_model.layers]


def whole(weight: Tensor) -> Tensor:
    """Unsharded copy of a weight that may be sharded; a collective call for all processes."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


@torch.no_grad()
def copy_weights(policy: DecoderPolicy, to: Any) -> None:
    """Copy the policy's weights to the model ``to`` of the same architecture."""
    mine = dict(to.named_parameters())
    for name, weight in policy.model.named_parameters():
        mine[name].copy_(whole(weight))


def optimizer_state(policy: DecoderPolicy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Unsharded optimizer state by weight name, in main memory, for the first process; a collective call.

    Names, not indices: a run may resume with more or fewer processes.
    """
    return dict(get_optimizer_state_dict(policy, optimizer, options=WHOLE))


def restore_optimizer(policy: DecoderPolicy, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of :func:`optimizer_state`."""
    set_optimizer_state_dict(policy, optimizer, state, options=WHOLE)
