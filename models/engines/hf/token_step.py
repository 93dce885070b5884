"""One token of every row through a decoder, without what transformers does around its layers.

A token of a small model takes as long as Python needs for it: half of that is masks, caches, configurations and keyword
arguments. Here the modules of a layer (norms, matrices with or without adapters, MLP) are called as they are; the loop
over layers and attention are written out, for the classes of :data:`LAYERS`, whose layers are computed alike. The
model's own forward pass is the slow twin, and takes over for any other model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .kv_cache import KVCacheLayer

LAYERS = (
    "LlamaDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen2VLDecoderLayer",
    "Qwen2_5_VLDecoderLayer",
    "Qwen3VLTextDecoderLayer",
)
GROWING_ROPE = ("dynamic", "longrope")  # frequencies that depend on the length so far
AHEAD = 32  # tokens whose rotations are computed at once


class TokenStep:
    """Last hidden states of one new token of each row. Rows may leave, repeat or move, but not join."""

    def __init__(self, decoder: Any, axes: int, positions: Tensor) -> None:
        """``positions``: of the rows' first tokens, (rows,), the same on all ``axes``."""
        self._decoder, self._axes = decoder, axes
        self._positions, self._done = positions, AHEAD
        self._cos = self._sin = positions.new_empty(len(positions), 0)  # (rows, AHEAD, head width)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (rows,) of indices, in this order."""
        self._positions, self._cos, self._sin = self._positions[rows], self._cos[rows], self._sin[rows]

    def __call__(self, tokens: Tensor, mask: Tensor | None, layers: list[KVCacheLayer]) -> Tensor:
        """(rows, width) for ``tokens`` (rows,); ``mask``: (rows, tokens so far and this one), 0 on padding."""
        hidden: Tensor = self._decoder.embed_tokens(tokens)
        cos, sin = self._rotation(hidden)
        bias = None
        if mask is not None:
            bias = hidden.new_zeros(mask.shape).masked_fill_(mask == 0, -torch.inf)[:, None, None]
        for layer, cached in zip(self._decoder.layers, layers, strict=True):
            hidden = hidden + _attention(layer.self_attn, layer.input_layernorm(hidden), cos, sin, bias, cached)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        final: Tensor = self._decoder.norm(hidden)
        return final

    def _rotation(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of the rows' next positions, (rows, 1, head width) each."""
        if self._done == AHEAD:
            places = self._positions[:, None] + torch.arange(AHEAD, device=hidden.device)
            every = places.expand(self._axes, -1, -1) if self._axes > 1 else places
            self._cos, sin = self._decoder.rotary_emb(hidden, every)
            half = sin.shape[-1] // 2
            self._sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            self._positions, self._done = self._positions + AHEAD, 0
        at = slice(self._done, self._done + 1)
        self._done += 1
        return self._cos[:, at], self._sin[:, at]


def _attention(module: Any, hidden: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, cached: Any) -> Tensor:
    """Attention of one token a row to itself and what came before; ``hidden``: (rows, width)."""
    rows, width = len(hidden), module.head_dim
    query = module.q_proj(hidden).view(rows, -1, width)
    key = module.k_proj(hidden).view(rows, -1, width)
    value = module.v_proj(hidden).view(rows, -1, 1, width)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    heads = query.shape[1]
    both = torch.cat([query, key], dim=1)
    half = width // 2
    swapped = torch.cat([both[..., half:], both[..., :half]], dim=-1)
    both = torch.addcmul(both * cos, swapped, sin)
    keys, values = cached.update(both[:, heads:, None], value)
    query = both[:, :heads].reshape(rows, keys.shape[1], -1, width)
    if hidden.is_cuda:
        out = functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=module.scaling)
    else:  # torch's kernel for CPUs is made for many queries
        scores = torch.matmul(query * module.scaling, keys.transpose(-1, -2))
        if bias is not None:
            scores += bias
        out = torch.matmul(scores.softmax(dim=-1), values)
    attended: Tensor = module.o_proj(out.reshape(rows, -1))
    return attended


def steps_by_token(decoder: Any) -> bool:
    """Whether :class:`TokenStep` computes what ``decoder``, a text model without its head, does."""
    layers = getattr(decoder, "layers", ())
    if len(layers) == 0 or any(type(layer).__name__ not in LAYERS for layer in layers):
        return False
    windows = any(getattr(layer.self_attn, "sliding_window", None) is not None for layer in layers)
    written = all(map(_as_written, (decoder, *layers, *(layer.self_attn for layer in layers))))
    return written and not windows and getattr(decoder.rotary_emb, "rope_type", None) not in GROWING_ROPE


def _as_written(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's forward pass, without hooks (such as those of FSDP)."""
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
