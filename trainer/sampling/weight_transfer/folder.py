"""Weights through files: on any device, and to servers on other machines that share a file system."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ....models.engines.vllm.weight_sync import FROZEN, LEARNING, Trained
from ...distributed import Distributed
from .base import PolicyModel

LARGEST_FILE = 2 << 30  # bytes; as much is held in main memory while it is collected


class FolderTransfer:
    """Safetensors files in a folder that every engine reads. Frozen weights are written once, when first needed.

    ``shared``: one engine for all processes, called by the first.
    """

    def __init__(
        self, model: PolicyModel, engine: Trained, distributed: Distributed, folder: Path, shared: bool
    ) -> None:
        self._model, self._engine, self._distributed = model, engine, distributed
        self._folder, self._shared = folder, shared
        self._cleared = self._frozen_written = False

    async def prepare(self, everything: bool) -> None:
        """Write the files; the first process does, the others take part if the weights are sharded."""
        await self._model.in_thread(partial(self._write, everything))
        self._distributed.wait()

    async def send(self, everything: bool) -> None:
        if self._distributed.first or not self._shared:
            await self._engine.reload(self._folder, everything)

    def _write(self, everything: bool) -> None:
        if not self._distributed.first and not self._distributed.sharded:
            return
        if self._distributed.first and not self._cleared:  # of what an earlier run left
            self._folder.mkdir(parents=True, exist_ok=True)
            for file in (*self._folder.glob(LEARNING), *self._folder.glob(FROZEN)):
                file.unlink()
            self._cleared = True
        if everything and not self._frozen_written:
            self._write_files(FROZEN, self._model.frozen)
            self._frozen_written = True
        self._write_files(LEARNING, self._model.learning)

    def _write_files(self, pattern: str, names: frozenset[str]) -> None:
        part: dict[str, Tensor] = {}
        number = size = 0
        for name, weight in self._model.read_only(names):
            if not self._distributed.first:
                continue  # here only to gather the weight
            if part and size + weight.nbytes > LARGEST_FILE:
                self._save(part, pattern, number)
                part, number, size = {}, number + 1, 0
            part[name] = weight.cpu().contiguous()
            size += weight.nbytes
        if part:
            self._save(part, pattern, number)

    def _save(self, part: dict[str, Tensor], pattern: str, number: int) -> None:
        save_file(part, self._folder / pattern.replace("*", f"{number:05d}"), metadata={"format": "pt"})
