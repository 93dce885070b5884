"""Patch embedding of a vision encoder, computed as a matrix product.

Qwen-VL's patches come already cut out, one per row, and a convolution whose kernel is a whole patch multiplies each by
one matrix. As a convolution that takes several times as long on CPUs, forward and backward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def multiply_patches(visual: Any) -> None:
    """Make ``visual`` embed patches by a matrix product with the same weights; no change where that does not apply."""
    embed = getattr(visual, "patch_embed", None)
    proj = getattr(embed, "proj", None)
    if embed is not None and isinstance(proj, nn.Conv3d) and proj.kernel_size == proj.stride and proj.groups == 1:
        embed.forward = MethodType(_product, embed)


def _product(embed: Any, patches: Tensor) -> Tensor:
    """``patches``: (patches, channels x frames x height x width) -> (patches, width)."""
    weight = embed.proj.weight.flatten(1)
    return functional.linear(patches.view(-1, weight.shape[1]).to(weight.dtype), weight, embed.proj.bias)
