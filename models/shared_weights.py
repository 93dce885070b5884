"""Weights in memory that several processes map: an optimizer step in one is seen by all, and nothing is sent.

The memory has no name (memfd_create): it goes with the last process that maps it, however that ends.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of a cache line


@dataclass(frozen=True)
class Place:
    """Where a weight is: its first byte, its shape and type."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class SharedWeights:
    """``path``: of the memory, as the processes of this user open it while its owner lives; ``places``: by name."""

    path: str
    size: int
    places: dict[str, Place]


def can_share() -> bool:
    return hasattr(os, "memfd_create")


def share(model: Any) -> SharedWeights:
    """Move the parameters of ``model``, on a CPU, into shared memory; they stay the same objects."""
    places: dict[str, Place] = {}
    size = 0
    for name, weight in model.named_parameters():
        places[name] = Place(size, tuple(weight.shape), weight.dtype)
        size += -(-weight.numel() * weight.element_size() // ALIGNMENT) * ALIGNMENT
    descriptor = os.memfd_create("capipe-weights")
    os.ftruncate(descriptor, size)
    shared = SharedWeights(f"/proc/{os.getpid()}/fd/{descriptor}", size, places)
    for name, view in _views(shared).items():
        weight = model.get_parameter(name)
        view.copy_(weight.detach())
        weight.data = view
    return shared


def attach(model: Any, shared: SharedWeights) -> None:
    """Let ``model``, of the same architecture, read the shared weights. Raises ValueError if it has others."""
    views = _views(shared)
    own = dict(model.named_parameters())
    if own.keys() != views.keys() or any(own[name].shape != view.shape for name, view in views.items()):
        raise ValueError("the model has other weights than the shared ones")
    for name, weight in own.items():
        weight.data = views[name]


def _views(shared: SharedWeights) -> dict[str, Tensor]:
    storage = torch.UntypedStorage.from_file(shared.path, shared=True, nbytes=shared.size)
    views = {}
    for name, place in shared.places.items():
        whole = torch.empty(0, dtype=place.dtype)
        whole.set_(storage)  # type: ignore[arg-type]
        first, count = place.start // whole.element_size(), torch.Size(place.shape).numel()
        views[name] = whole[first : first + count].view(place.shape)
    return views
