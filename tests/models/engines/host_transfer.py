"""vLLM's IPC transfer with main memory in CUDA's place, for workers on a CPU; all else is vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

from capipe.models.engines.vllm.weight_sync import WeightSync, _pack_tied_heads

BACKEND = "host"
# As a worker can import it: pytest names this module after the folder of the checkout, whatever that is called.
EXTENSION = "capipe.tests.models.engines.host_transfer.HostSync"


class HostTransfer(IPCWeightTransferEngine):
    """A worker's side: a handle is the weight itself."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # without waiting for a device

    def receive_weights(self, update_info: Any) -> None:
        weights = [rebuild_tensor(*handle[BACKEND]) for handle in update_info.ipc_handles]
        self.model.load_weights(list(zip(update_info.names, weights, strict=True)))

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        _pack_tied_heads(self.model)  # as after a reload on a CPU


WeightTransferEngineFactory.register_engine(BACKEND, HostTransfer)


class HostSync(WeightSync):
    """Our extension, in a module that a worker imports before it makes its transfer engine."""


def no_cuda(patch: pytest.MonkeyPatch) -> None:
    """What vLLM's sending side asks of CUDA besides handles."""
    patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=BACKEND))
    patch.setattr(torch.cuda, "ipc_collect", lambda: None)
