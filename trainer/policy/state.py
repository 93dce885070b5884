"""A policy's state in a checkpoint: the weights that learn, in float32, and the optimizer's moments.

Written by `torch.distributed.checkpoint`, each process its own shards, in the background; read by any number of
processes, each what it needs. The files are safetensors, which hold tensors and their offsets and nothing to unpickle
(that library's own format has a pickled index).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from ...errors import BadInput
from ..distributed import Distributed
from .decoder import DecoderPolicy

FOLDER = "state"  # in a checkpoint
WEIGHT, STEPS = "weight.", "step."  # prefixes of tensors' names; the others are the optimizer's


def state_of(checkpoint: Path) -> Path | None:
    """The state's folder in a checkpoint; None in older ones, which have it in one file."""
    folder = checkpoint / FOLDER
    return folder if folder.is_dir() else None


def learning_weights(policy: DecoderPolicy) -> dict[str, Tensor]:
    """The weights that learn, by name, those of an adapter and a value head among them."""
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


def state_tensors(policy: DecoderPolicy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights that learn and all that the optimizer keeps of each, sharded as they are; by name, not by index.

    Settings and learning rates are not state: they follow from the recipe and the step.
    """
    tensors = {}
    for name, weight in learning_weights(policy).items():
        tensors[WEIGHT + name] = weight.detach()
        for key, value in optimizer.state.get(weight, {}).items():
            tensors[f"{key}.{name}"] = value.reshape(1) if value.ndim == 0 else value
    return dict(sorted(tensors.items()))  # an optimizer that was restored has its entries in another order


def save_state(folder: Path, tensors: Mapping[str, Tensor], distributed: Distributed) -> Future[Any]:
    """Copy the tensors to main memory, then write them in the background; the future ends when they are on disk.

    A collective call for all processes if weights are sharded, else for one. Nothing may run in
    ``distributed.writers`` until the future ends.
    """
    _expect_one_process()
    future: Future[Any] = async_save(  # type: ignore[assignment]
        dict(tensors),
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
        process_group=distributed.writers,
        no_dist=not distributed.sharded,
    )
    return future


def sort_headers(folder: Path) -> None:
    """Sort the headers of the state's files, in place: the library writes them in another order each time.

    A header is JSON behind its length in 8 bytes (safetensors' format); offsets of tensors do not count it.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("r+b") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.dumps(json.loads(stream.read(size)), sort_keys=True, separators=(",", ":")).encode()
            if len(header) <= size:  # a library that writes it shorter keeps its own order
                stream.seek(8)
                stream.write(header.ljust(size))


def load_weights(folder: Path, policy: DecoderPolicy) -> None:
    """Load the weights that learn, in place, whole or sharded. Raises BadInput if the state is of other weights."""
    _load(folder, {WEIGHT + name: weight.detach() for name, weight in learning_weights(policy).items()})


def load_optimizer(folder: Path, policy: DecoderPolicy, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state of a checkpoint of as many processes or another number. Raises BadInput."""
    weights = learning_weights(policy)
    tensors: dict[str, Tensor] = {}
    for stored in _names(folder):
        key, _, name = stored.partition(".")
        if f"{key}." != WEIGHT and name in weights:
            tensors[stored] = torch.zeros(1) if f"{key}." == STEPS else torch.zeros_like(weights[name].detach())
    _load(folder, tensors)
    for stored, value in tensors.items():
        key, _, name = stored.partition(".")
        optimizer.state[weights[name]][key] = value.reshape(()) if f"{key}." == STEPS else value


def _names(folder: Path) -> list[str]:
    try:
        return list(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _unreadable(folder, error) from None


def _load(folder: Path, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        return
    try:
        _expect_one_process()
        # Each process reads what it needs; there is nothing to agree upon.
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        raise _unreadable(folder, next(iter(error.failures.values()))[0]) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: BaseException) -> BadInput:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return BadInput(
        f"{folder}: cannot be read, or is of another recipe ({reason}); remove the checkpoint to go on from the one "
        "before"
    )


def _expect_one_process() -> None:
    """For the whole process, as the warning comes from a thread of the library."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
