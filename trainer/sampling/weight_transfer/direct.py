"""Weights from GPU to GPU by vLLM's own transfer: CUDA IPC to the engine of this process, NCCL to servers.

Never run here, for lack of a GPU: tested up to CUDA's and NCCL's own calls, with a real vLLM on a CPU behind them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from ....errors import BadInput
from ....models.engines.base import EngineDead
from ....models.engines.http.server import server_urls
from ....models.engines.loading import vllm_runs
from ....models.engines.vllm.weight_sync import Trained
from ...distributed import Distributed
from ...recipe_sections import RolloutConfig
from .base import PolicyModel

Result = TypeVar("Result")


class Sender(Protocol):
    """vLLM's trainer side: sends what ``source`` yields, by a blocking call."""

    source: Any

    def send_weights(self) -> None: ...


class DirectTransfer:
    """vLLM's own weight transfer, connected by :func:`open_direct`.

    ``everything``, ``learning``: sources of all weights, and of those that training changes. ``shared``: one engine for
    all processes.
    """

    def __init__(
        self,
        model: PolicyModel,
        engine: Trained,
        sender: Sender,
        everything: Any,
        learning: Any,
        distributed: Distributed,
        shared: bool,
    ) -> None:
        self._model, self._engine, self._sender = model, engine, sender
        self._everything, self._learning = everything, learning
        self._distributed, self._shared = distributed, shared

    async def prepare(self, everything: bool) -> None:
        """Nothing: the weights are read while they are sent."""

    async def send(self, everything: bool) -> None:
        self._sender.source = self._everything if everything else self._learning
        await self._model.in_thread(partial(_or_dead, self._sender.send_weights))
        if self._distributed.first or not self._shared:
            await self._engine.forget()


def refuse_direct(rollout: RolloutConfig, device: torch.device) -> None:
    """Raise BadInput where ``rollout.sync: direct`` cannot work."""
    if rollout.sync != "direct":
        return
    if device.type != "cuda":
        raise BadInput(
            f"rollout.sync direct: sends weights from GPU to GPU, and the policy is on the {device.type}; "
            "set rollout.sync: folder"
        )
    if not vllm_runs():
        raise BadInput(
            "rollout.sync direct: vLLM's part of it runs in this process, too, and vLLM is not installed here; "
            "set rollout.sync: folder, or install capipe[vllm]"
        )


async def open_direct(
    model: PolicyModel, engine: Trained, distributed: Distributed, rollout: RolloutConfig
) -> DirectTransfer:
    """Connect policy and engine; a collective call. Raises EngineDead."""
    from ....models.engines.vllm.weight_transfer import (
        EngineClient,
        PolicyWeights,
        address_towards,
        open_ipc,
        open_nccl,
    )

    changing = {name: shape for name, shape in model.shapes.items() if name in model.learning}
    everything = PolicyWeights(model.shapes, partial(model.read, True), model.dtype)
    learning = PolicyWeights(changing, partial(model.read, False), model.dtype)
    client = EngineClient(engine, asyncio.get_running_loop())
    shared = rollout.engine != "vllm"
    opening: Callable[[], Any] = partial(open_ipc, client, everything)
    if shared:
        workers = await client.workers() if distributed.first else 0
        address = address_towards(server_urls(rollout.engine)[0])
        opening = partial(open_nccl, client, everything, distributed.rank, address, workers)
    sender = await model.in_thread(partial(_or_dead, opening))
    return DirectTransfer(model, engine, sender, everything, learning, distributed, shared)


def _or_dead(work: Callable[[], Result]) -> Result:
    """Raise EngineDead for any error of vLLM's, torch's or NCCL's."""
    try:
        return work()
    except EngineDead:
        raise
    except Exception as error:
        raise EngineDead(f"the rollout engine took no new weights: {type(error).__name__}: {error}") from error
