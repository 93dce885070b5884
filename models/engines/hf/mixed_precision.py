"""Computing in bfloat16 outside autocast: a head's product with float32 sums, and frozen weights kept in bfloat16.

Autocast casts float32 matrices at each use, so that frozen ones can as well be kept in the type they are cast to: every
product is the same to the last bit, in half the memory.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

Model = TypeVar("Model", bound=nn.Module)

OUTSIDE = "predictions.transform"  # BLIP's layer before its head, which the trainer computes without autocast


def head_product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, rounded: Tensor | None = None) -> Tensor:
    """Logits (rows, vocabulary), of a head's inputs (rows, width) and its ``weight`` (vocabulary, width).

    With ``rounded``, the matrix in bfloat16, inputs are rounded as well and products are summed up in float32, which
    the result is in; without it everything is computed in the weights' own type. Gradients are the trainer's business.
    """
    if rounded is None:
        return functional.linear(hidden, weight, bias)
    logits = rounded_matmul(hidden.to(rounded.dtype), rounded.t())
    return logits if bias is None else logits + bias.float()


def rounded_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Product of two bfloat16 matrices in float32: on CUDA by tensor cores, else of the same values in float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def keep_rounded(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast the frozen matrices of ``model`` to ``dtype`` in place, where autocast would cast them; nothing for None."""
    matrices = cast_at_use(model)
    for weight in model.parameters():
        if dtype is not None and id(weight) in matrices and not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def frozen_copy(
    model: Model, dtype: torch.dtype | None, device: torch.device | str | None = None, entirely: bool = False
) -> Model:
    """Frozen copy on ``device``, its matrices in ``dtype`` as by :func:`keep_rounded`, with ``entirely`` all weights.

    Each weight is cast on its way, so that at no time a second one of the same size is in memory.
    """
    matrices = cast_at_use(model)
    weights: dict[int, Any] = {}
    for weight in model.parameters():
        kind = dtype if dtype is not None and (entirely or id(weight) in matrices) else weight.dtype
        copied = weight.detach().to(device or weight.device, kind, copy=True)
        weights[id(weight)] = nn.Parameter(copied, requires_grad=False)
    return deepcopy(model, weights).to(device)


def cast_at_use(model: nn.Module) -> set[int]:
    """Matrices that autocast casts at each use, by id().

    Embeddings (and a head that shares its matrix with them), norms and biases are not: they are computed in their own
    type, and rounding them would change what is computed. Nor are the convolutions of patches, which are small: models
    cast other weights to their type.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and OUTSIDE not in name
    } - looked_up
