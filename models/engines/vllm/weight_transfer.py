"""Weights sent to vLLM by its own weight transfer, without files: CUDA IPC on one GPU, NCCL between GPUs.

vLLM's trainer side drives it: it announces names and shapes, sends the weights, and has the engine finish the update.
Its calls block, so they run in a thread and reach the engine through the event loop. Needs vLLM in this process too,
even where servers receive the weights. Written for vLLM 0.32 and 0.33, whose trainer sides differ.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

from .weight_sync import Served, Trained

Read = Callable[[], Iterator[tuple[str, Tensor]]]


class Declared(list[ParamMeta]):
    """Names, types and shapes of weights: a list, which vLLM 0.32 also calls."""

    def __call__(self) -> Declared:
        return self


class PolicyWeights(WeightSource):
    """Weights as vLLM asks for them: ``shapes`` by name, in the order in which ``read`` yields them, in one type.

    vLLM 0.32 iterates it, later ones ask for ``iter_full``; ``metadata`` must not change, so that all weights and those
    that training changes are two sources.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Read, dtype: torch.dtype) -> None:
        self._shapes, self._read, self._dtype = dict(shapes), read, dtype

    @cached_property
    def metadata(self) -> Declared:
        return Declared(ParamMeta(name, self._dtype, shape) for name, shape in self._shapes.items())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._read()

    def iter_full(self) -> Iterator[tuple[str, Tensor]]:
        return self._read()

    @property
    def largest(self) -> int:
        """Bytes of the largest weight."""
        return max(torch.Size(shape).numel() for shape in self._shapes.values()) * self._dtype.itemsize


class EngineClient:
    """An engine's part of the transfer, for vLLM's trainer side, which calls it from a thread of its own."""

    def __init__(self, engine: Trained, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._loop = engine, loop

    async def workers(self) -> int:
        """Number of processes that receive the weights, of servers. Raises EngineDead."""
        assert isinstance(self._engine, Served)
        return await self._engine.workers()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update")

    def _call(self, command: str, **arguments: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._engine.weight_update(command, **arguments), self._loop).result()


def open_ipc(client: EngineClient, source: PolicyWeights, packed: bool = True) -> TrainerWeightTransferEngine:
    """The transfer to an engine on this process's own GPU; a blocking call.

    Each process sends to its own engine, so each is the sender of its transfer. ``packed``: through one buffer, which
    must hold the largest weight; otherwise a second set of weights is in memory until the update ends.
    """
    size = max(DEFAULT_PACKED_BUFFER_SIZE_BYTES, source.largest)
    info = IPCTrainerInitInfo(packed=packed, packed_buffer_size_bytes=size, rank=0)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def open_nccl(
    client: EngineClient, source: PolicyWeights, rank: int, address: str, workers: int, packed: bool = True
) -> TrainerWeightTransferEngine:
    """The transfer from process 0 to all ``workers`` of the servers; a blocking call for all training processes.

    ``address``: this machine's, as the servers reach it.
    """
    info = NCCLTrainerInitInfo(
        master_address=address,
        master_port=free_port() if rank == 0 else 0,
        world_size=1 + workers,
        packed=packed,
        rank=rank,
    )
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def address_towards(url: str) -> str:
    """This machine's address on the network of ``url``'s host; nothing is sent."""
    parts = urlsplit(url)
    family, kind, _, _, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])
