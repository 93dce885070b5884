"""New weights for a running vLLM: the extension of its worker processes, loaded by ``worker_extension_cls``.

Weights arrive as safetensors files in a folder, all of them or only those that training changes; vLLM's
``reload_weights`` loads what it is given and keeps the rest. On a CPU that is not enough: linear layers keep a copy
packed by oneDNN, and where head and embedding are tied, the head's copy keeps the old weights, as no weight of its own
is loaded. The model then answers with neither the old nor the new weights' tokens. The head is repacked here; the
caller must check with a probe that it worked, since nothing else shows it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

#: The class that vLLM loads, by its public name (:mod:`capipe.models.vllm_sync`), and the methods to call.
EXTENSION, RELOAD, PRECISION = "capipe.models.vllm_sync.WeightSync", "capipe_reload", "capipe_precision"
#: Files in a folder of weights: those that training changes, and the rest.
LEARNING, FROZEN = "learning-*.safetensors", "frozen-*.safetensors"
RELOADING = "vllm.model_executor.model_loader.reload"


@dataclass(frozen=True)
class Precision:
    """Names of torch dtypes: that an engine computes in and holds its weights in, and that of its head."""

    weights: str
    head: str


@runtime_checkable
class Trained(Protocol):
    """An engine that takes new weights of its model while it is idle. All raise EngineDead.

    ``reload``: from a folder that the engine can read, ``everything`` or only the weights that training changes.
    ``weight_update``: a command of vLLM's own weight transfer, with its arguments. ``forget``: empty the caches that
    older weights filled, which ``reload`` does itself.
    """

    async def precision(self) -> Precision: ...

    async def reload(self, folder: Path, everything: bool = True) -> None: ...

    async def weight_update(self, command: str, **arguments: Any) -> None: ...

    async def forget(self) -> None: ...


@runtime_checkable
class Served(Trained, Protocol):
    """Servers. ``workers``: number of their worker processes, each of which receives weights."""

    async def workers(self) -> int: ...


class WeightSync:
    """Methods added to vLLM's worker, whose own the attributes are."""

    model_runner: Any
    vllm_config: Any

    def capipe_reload(self, path: str, everything: bool = True) -> None:
        """Load the weights of the folder ``path`` and empty the worker's caches of what older ones computed."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config), nullcontext() if everything else _quiet(RELOADING):
            self.model_runner.reload_weights(weights_iterator=read_weights(Path(path), everything))
        _pack_tied_heads(self.model_runner.get_model())

    def capipe_precision(self) -> dict[str, str]:
        """The fields of :class:`Precision`."""
        model = self.vllm_config.model_config
        return {"weights": _name(model.dtype), "head": _name(model.head_dtype)}


def read_weights(folder: Path, everything: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a folder, one at a time. Raises FileNotFoundError where there are none to read."""
    from safetensors import safe_open

    patterns = (FROZEN, LEARNING) if everything else (LEARNING,)
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"{folder}: has no {' or '.join(patterns)}")
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no dict
                yield name, weights.get_tensor(name)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep vLLM from warning, at every step, of each layer that it was given no weights for."""
    loggers = [logging.getLogger(f"{name}.{module}") for module in ("inplace", "layerwise")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _pack_tied_heads(model: Any) -> None:
    """Repack heads that share the embedding's weight (vLLM on CPUs only)."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
