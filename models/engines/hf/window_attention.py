"""Window attention of a vision encoder, with all windows of one length in one call.

Without FlashAttention, transformers processes an encoder's windows (Qwen2.5-VL has 36 in an image of 336 pixels) and
images one by one, in each layer: on a CPU a third of the encoder's time, on a GPU a kernel launch each. Registered with
transformers under :data:`NAME`; only an implementation with "flash" in its name gets all windows at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "capipe_flash_windows"


def window_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query``, ``key``, ``value``: (1, heads, patches, width); ``cu_seq_lens_q``: starts of windows, and the end.

    Without windows it is SDPA. Returns (1, patches, heads, width), as transformers expects, and no weights.
    """
    if cu_seq_lens_q is None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return whole
    lengths = cu_seq_lens_q.diff().tolist()
    if len(set(lengths)) == 1:  # contiguous: nothing has to move
        return _attend(query, key, value, lengths[0], scaling, dropout)[None], None
    starts = cu_seq_lens_q[:-1].tolist()
    result = torch.empty_like(query.transpose(1, 2)[0])
    for length in sorted(set(lengths)):
        here = torch.tensor([start for start, size in zip(starts, lengths, strict=True) if size == length])
        places = (here[:, None] + torch.arange(length)).flatten().to(query.device)
        q, k, v = (states.index_select(2, places) for states in (query, key, value))
        result = result.index_copy(0, places, _attend(q, k, v, length, scaling, dropout))
    return result[None], None


def _attend(query: Tensor, key: Tensor, value: Tensor, length: int, scaling: float | None, dropout: float) -> Tensor:
    """Attention in contiguous windows of ``length`` patches: (1, heads, patches, width) -> (patches, heads, width)."""
    q, k, v = (states[0].unflatten(1, (-1, length)).transpose(0, 1) for states in (query, key, value))
    out = functional.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2).flatten(0, 1)


def batch_windows(visual: Any) -> None:
    """Make the vision encoder ``visual`` process its windows together, where it would take them one by one."""
    config = getattr(visual, "config", None)
    if config is not None and config._attn_implementation == "sdpa":
        config._attn_implementation = NAME


AttentionInterface.register(NAME, window_attention)
