"""Data-parallel processes (`torchrun`): all-reduced sums, and gradients equal to those of a single process.

A step's loss is a sum over the completions of all processes, weighted with totals over all of them. So gradients are
summed, never averaged, and the number of completions or micro-batches per process does not matter.
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..models.child_processes import follow

Item = TypeVar("Item")

PATIENCE = timedelta(minutes=30)  # timeout: a process may wait for another's rollouts
# Environment variables set by torchrun and inherited by child processes.
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
BUCKET = 1 << 25  # weights per all-reduce of gradients: 128 MB of float32


class Agreed(Exception):
    """An error that all processes raise at the same place. ``error``: this process's own, None for another's."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(str(error) if error is not None else "another process failed")
        self.error = error


@dataclass(frozen=True)
class Distributed:
    """``rank`` of ``count`` processes; ``sharded``: FSDP2 shards the weights and sums the gradients.

    ``mesh``: processes as (nodes, processes of a node), if weights are sharded within a node and replicated between
    nodes. ``writers``: the group in which checkpoints are written, beside the training's own collective calls.
    """

    rank: int = 0
    count: int = 1
    sharded: bool = False
    mesh: DeviceMesh | None = None
    writers: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes shared output."""
        return self.rank == 0

    @property
    def loss_scale(self) -> float:
        """Factor on the loss so that gradients are summed: FSDP2 divides by the number of processes."""
        return float(self.count) if self.sharded else 1.0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, not in place."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, value: int) -> int:
        """Largest ``value`` of all processes."""
        return int(self._reduced(torch.tensor(value), dist.ReduceOp.MAX))

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.count == 1:
            return values
        on_device = values.to(_device(), copy=True)
        dist.all_reduce(on_device, how)
        return on_device.to(values.device)

    def share(self, items: list[Item]) -> list[Item]:
        """This process's share of a step's items; shares differ by one item at most."""
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

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise an error of the body in all processes, as :class:`Agreed`: else the others would wait for this one.

        A single process raises the error itself. The body has no collective calls.
        """
        if self.count == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
        if self.most(int(error is not None)):
            raise Agreed(error) from error

    def wait(self) -> None:
        """Wait until all processes are here."""
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
    """Environment for child processes with ``device`` as their only GPU and without `torchrun`'s variables.

    Otherwise vLLM would use the first GPU in every process, and wait for torchrun's rendezvous.
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
    """Join the process group of `torchrun`, if any. Ranks on one machine use its GPUs in order."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow(os.getppid())  # exit with torchrun, even if it is killed
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    mesh = nodes_mesh(count, int(os.environ.get("LOCAL_WORLD_SIZE", count))) if sharded else None
    return Distributed(dist.get_rank(), count, sharded, mesh, dist.new_group(backend="gloo", timeout=PATIENCE))


def nodes_mesh(count: int, local: int) -> DeviceMesh | None:
    """Mesh (nodes, processes of a node) of ``count`` processes, ``local`` of them on this node; None for one node.

    Also None for nodes of one process, which can split nothing, and for nodes of unequal sizes: then weights are
    sharded over all processes. A collective call, as `torchrun` tells a process its own node's size only.
    """
    sizes = torch.tensor([local, -local], device=_device())
    dist.all_reduce(sizes, dist.ReduceOp.MAX)
    if int(sizes.sum()) or local in (1, count):
        return None
    return init_device_mesh(_device().type, (count // local, local), mesh_dim_names=("nodes", "local"))
