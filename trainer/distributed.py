"""The processes that train together (`torchrun`): sums over them, and gradients that equal a single process's.

A step's loss is a sum over the completions of all processes, weighed by totals over all of them. So gradients are
summed, never averaged, and it does not matter how many completions each process has, or in how many micro-batches.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.child_processes import follow

Item = TypeVar("Item")

PATIENCE = timedelta(minutes=30)  # one process may wait for another's rollouts
# The environment that torchrun gives its processes, and they whatever they start.
TORCHRUN = {
    *(
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "ROLE_NAME",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
    ),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
BUCKET = 1 << 25  # weights whose gradients travel together: 128 MB of float32


@dataclass(frozen=True)
class Distributed:
    """``rank`` of ``count`` processes; ``sharded``: weights are split over them (FSDP2), gradients summed by that."""

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def loss_scale(self) -> float:
        """Factor on a loss that makes its gradients sum up: FSDP2 divides by the number of processes."""
        return float(self.count) if self.sharded else 1.0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on a copy."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, value: int) -> int:
        """The largest ``value`` of all processes."""
        return int(self._reduced(torch.tensor(value), dist.ReduceOp.MAX))

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.count == 1:
            return values
        on_device = values.to(_device(), copy=True)
        dist.all_reduce(on_device, how)
        return on_device.to(values.device)

    def share(self, items: list[Item]) -> list[Item]:
        """This process's part of a step's items; parts differ by one at most."""
        return items[self.rank :: self.count]

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Sum gradients over all processes in place, in large buckets; a weight without one counts as zero."""
        if self.count == 1 or self.sharded:
            return
        bucket: list[nn.Parameter] = []
        size = 0
        for weight in weights:
            if not weight.requires_grad:
                continue
            if bucket and (size + weight.numel() > BUCKET or weight.dtype != bucket[0].dtype):
                _sum_bucket(bucket)
                bucket, size = [], 0
            bucket.append(weight)
            size += weight.numel()
        if bucket:
            _sum_bucket(bucket)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Distributed()


def _sum_bucket(bucket: list[nn.Parameter]) -> None:
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for weight, part in zip(bucket, flat.split([weight.numel() for weight in bucket]), strict=True):
        weight.grad = part.view_as(weight)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def alone_on(device: torch.device) -> Iterator[None]:
    """Start processes inside with ``device`` as their only GPU and without `torchrun`'s environment.

    vLLM would take the first GPU in every process, and wait for a rendezvous that is not its own.
    """
    before = dict(os.environ)
    for name in before:
        if name in TORCHRUN or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    if device.type == "cuda":
        visible = before.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = device.index or 0
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) and visible[index] else str(index)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def join(sharded: bool) -> Distributed:
    """The processes that `torchrun` started, or this one alone. Ranks of one machine take its GPUs in order."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow(os.getppid())  # a killed torchrun leaves none of us
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return Distributed(dist.get_rank(), count, sharded)
