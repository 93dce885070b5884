"""Weights sharded over the training processes (FSDP2, HSDP), and gathered for sampling and saving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from .decoder import DecoderPolicy

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(policy: DecoderPolicy, mesh: DeviceMesh | None = None, frozen: bool = False) -> None:
    """Shard the weights of ``policy`` in place: each layer, then the rest as one unit.

    Over all processes, or over the second dimension of ``mesh`` (nodes, processes of a node), and replicated over the
    first. ``frozen``: no backward pass follows, so that the last unit is split again after the forward pass, too.
    """
    for layer in layers_of(policy):
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh, reshard_after_forward=True if frozen else None)


def layers_of(policy: DecoderPolicy) -> list[Any]:
    """Layers in the order of the forward pass: vision encoder, then decoder."""
    base = policy.base
    return [*base.visual.blocks, *base.language_model.layers]


def whole(weight: Tensor) -> Tensor:
    """Unsharded copy of a weight that may be sharded; a collective call for all processes."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


@torch.no_grad()
def copy_weights(policy: DecoderPolicy, to: Any) -> None:
    """Copy the policy's weights that learn to the model ``to`` of the same architecture, in its type and place.

    A collective call for all processes; None for those without such a model.
    """
    theirs = {} if to is None else dict(to.named_parameters())
    for name, weight in policy.model.named_parameters():
        if weight.requires_grad:
            gathered = whole(weight)
            if to is not None:
                theirs[name].copy_(gathered)


def optimizer_state(policy: DecoderPolicy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Unsharded optimizer state by weight name, in main memory, for the first process; a collective call.

    Names, not indices: a run may resume with more or fewer processes.
    """
    return dict(get_optimizer_state_dict(policy, optimizer, options=WHOLE))


def restore_optimizer(policy: DecoderPolicy, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of :func:`optimizer_state`."""
    set_optimizer_state_dict(policy, optimizer, state, options=WHOLE)
