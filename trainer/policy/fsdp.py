"""Weights split over the processes that train together (FSDP2), and whole again for whoever samples or saves."""

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
    """Split the weights of ``policy`` over all processes, in place: layer by layer, what is left with the whole."""
    for layer in layers_of(policy):
        fully_shard(layer)
    fully_shard(policy)


def layers_of(policy: DecoderPolicy) -> list[Any]:
    """The blocks that a forward pass goes through one after another: of the tower, then of the decoder."""
    base = policy.base
    return [*base.visual.blocks, *base.language_model.layers]


def whole(weight: Tensor) -> Tensor:
    """The whole of a weight that may be split; all processes have to ask for it."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


@torch.no_grad()
def copy_weights(policy: DecoderPolicy, to: Any) -> None:
    """Give the model ``to`` the weights of the policy's; both are of one architecture."""
    mine = dict(to.named_parameters())
    for name, weight in policy.model.named_parameters():
        mine[name].copy_(whole(weight))


def optimizer_state(policy: DecoderPolicy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of the optimiser by weights' names, in main memory, for the first process; all have to ask.

    Names, not numbers: a run may go on with its weights split over more or fewer processes.
    """
    return dict(get_optimizer_state_dict(policy, optimizer, options=WHOLE))


def restore_optimizer(policy: DecoderPolicy, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The way back from :func:`optimizer_state`."""
    set_optimizer_state_dict(policy, optimizer, state, options=WHOLE)
