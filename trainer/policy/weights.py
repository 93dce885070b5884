"""The weights of a model in training under its Hugging Face names, whole, one at a time, for engines that load them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from .fsdp import whole
from .lora import merged_weights


def weight_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights by name; a weight in two places (a tied head) has the first one's name alone."""
    return {
        name.replace(".base_layer.", "."): tuple(weight.shape)
        for name, weight in model.named_parameters()
        if ".lora_" not in name
    }


def learning_names(model: Any) -> frozenset[str]:
    """Names of the weights that training changes, and of their neighbours in the same block.

    An engine keeps some neighbours in one matrix (queries, keys and values; gate and up), and writes such a matrix
    whole: what it is not given of it would be lost. So an adapter of the queries alone sends keys and values, too.
    """
    blocks = {
        _block(f"{name.partition('.lora_')[0]}.weight" if ".lora_" in name else name)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    return frozenset(name for name in weight_shapes(model) if _block(name) in blocks)


@torch.no_grad()
def whole_weights(model: Any, names: Collection[str], dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and unsharded weights, an adapter's part added, in the order of :func:`weight_shapes`.

    A collective call if the model is sharded: all processes must go through it to its end. Weights that need no other
    ``dtype`` may be the model's own.
    """
    for name, weight in merged_weights(model):
        if name in names:
            yield name, whole(weight).to(dtype)


def _block(name: str) -> str:
    """Name of the block that a weight's module is in: ``layers.0.self_attn`` for ``layers.0.self_attn.q_proj.bias``."""
    return ".".join(name.split(".")[:-2])
