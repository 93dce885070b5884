"""What an engine is given: the weights of the model in training, in the engine's type, all or those that learn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ....models.engines.vllm.weight_sync import Precision
from ...policy.weights import learning_names, weight_shapes, whole_weights

Result = TypeVar("Result")


class WeightTransfer(Protocol):
    """Collective calls of all processes. ``everything``: all weights, or only those that training changes.

    ``prepare`` needs nothing of the engine, which may sleep; ``send`` needs it idle, with memory for its weights.
    """

    async def prepare(self, everything: bool) -> None: ...

    async def send(self, everything: bool) -> None:
        """Raises EngineDead."""
        ...


class PolicyModel:
    """The model in training as an engine of some precision gets it. ``learning``: names of what training changes."""

    def __init__(self, model: Any, precision: Precision) -> None:
        self.dtype: torch.dtype = getattr(torch, precision.weights)
        self.shapes = weight_shapes(model)
        self.learning = learning_names(model)
        self.frozen = frozenset(self.shapes) - self.learning
        self._device: torch.device = next(model.parameters()).device
        self._model = model

    def read(self, everything: bool) -> Iterator[tuple[str, Tensor]]:
        """Names and weights in the order of ``shapes``; a collective call if the model is sharded."""
        return self.read_only(frozenset(self.shapes) if everything else self.learning)

    def read_only(self, names: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        """Those of ``names``; a collective call if the model is sharded."""
        return whole_weights(self._model, names, self.dtype)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` beside the event loop, on the model's device, which torch sets per thread."""

        def on_device() -> Result:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            return work()

        return await asyncio.to_thread(on_device)
