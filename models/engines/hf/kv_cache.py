"""KV cache with room for tokens to come: appending one does not copy all that came before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer

LEAST_ROOM = 64  # tokens; or a quarter of the current length, where that is more


class KVCacheLayer(DynamicLayer):
    """Implements transformers' cache layer. ``keys``, ``values``: (rows, heads, tokens, width), views of buffers."""

    def __init__(self, *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **rest: Any) -> tuple[Tensor, Tensor]:
        used, new = self.get_seq_length(), key_states.shape[-2]
        if used == 0:  # a prompt; its rows are selected before the first token is sampled
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        if self._room is None or self._room[0].shape[-2] < used + new:
            size = used + max(new, LEAST_ROOM, used // 4)
            self._room = _enlarged(self.keys, size), _enlarged(self.values, size)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, used : used + new] = states
        self.keys, self.values = (room[:, :, : used + new] for room in self._room)
        return self.keys, self.values

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (rows,) of indices, in this order; indices may repeat."""
        used = self.get_seq_length()
        if self._room is None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            return
        keys, values = (room.index_select(0, rows) for room in self._room)
        self._room = keys, values
        self.keys, self.values = keys[:, :, :used], values[:, :, :used]


def _enlarged(states: Tensor, size: int) -> Tensor:
    rows, heads, used, width = states.shape
    room = torch.empty(rows, heads, size, width, dtype=states.dtype, device=states.device)
    room[:, :, :used] = states
    return room


def new_cache(config: Any, growing: bool) -> DynamicCache:
    """An empty cache for a text model's ``config``; ``growing`` where all of its layers have full attention.

    Beside recurrent layers, those of full attention grow, too.
    """
    cache = DynamicCache(config=config)
    hybrid = is_recurrent(cache)
    cache.layers = [
        KVCacheLayer() if growing or (hybrid and type(layer) is DynamicLayer) else layer for layer in cache.layers
    ]
    return cache


def is_recurrent(cache: Cache) -> bool:
    """Whether some of a cache's layers keep a running state."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


class CrossCache(EncoderDecoderCache):
    """Cache of a decoder that attends to an encoder: keys and values of the encoder's states are computed once.

    ``seen``: (1, states, width), of which later tokens use nothing but the number of states.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(new_cache(config, growing=True), new_cache(config, growing=True))
        self.seen: Tensor | None = None


def stateful_layers(cache: Cache) -> list[str]:
    """The classes of a cache's layers from which :func:`select_rows` cannot select rows.

    Those that keep a running state beside keys and values: transformers would silently select rows of the latter alone.
    """
    kinds = {type(layer) for layer in cache.layers} - {LinearAttentionLayer}
    running = {kind for kind in kinds if issubclass(kind, LinearAttentionCacheLayerMixin)}
    return sorted(kind.__name__ for kind in kinds if kind in running or not hasattr(kind, "batch_select_indices"))


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep these rows of a cache."""
    if isinstance(cache, EncoderDecoderCache):
        select_rows(cache.self_attention_cache, rows)
        select_rows(cache.cross_attention_cache, rows)
        return
    for layer in cache.layers:
        if isinstance(layer, KVCacheLayer):
            layer.select(rows)
        elif type(layer) is LinearAttentionLayer:
            _select_states(layer, rows)
        else:
            layer.batch_select_indices(rows)


def _select_states(layer: LinearAttentionLayer, rows: Tensor) -> None:
    """Select rows of a recurrent layer's states, (rows, heads, key width, value width), and convolution windows."""
    for states in (layer.conv_states, layer.recurrent_states):
        for index, state in states.items():
            if state is not None:
                states[index] = state.index_select(0, rows)
