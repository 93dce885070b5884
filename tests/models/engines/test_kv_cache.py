"""A cache with room holds what transformers' own holds, whatever rows stay."""

from __future__ import annotations

import torch
from transformers import DynamicCache, Qwen2Config

from capipe.models.engines.hf.kv_cache import LEAST_ROOM, new_cache, select_rows

CONFIG = Qwen2Config(num_hidden_layers=2)


def states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(rows, 2, tokens, 8), torch.randn(rows, 2, tokens, 8)


def test_tokens_and_rows_come_and_go() -> None:
    ours, theirs = new_cache(CONFIG, growing=True), new_cache(CONFIG, growing=False)
    rows, seed = 3, 0
    for tokens, kept in ((5, [0, 0, 2, 1, 1]), (1, None), (7, [4, 0, 1]), (1, None), (LEAST_ROOM + 3, [2]), (1, None)):
        for layer in range(2):
            seed += 1
            made = states(rows, tokens, seed)
            found, expected = (cache.update(*made, layer) for cache in (ours, theirs))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        if kept is not None:
            for cache in (ours, theirs):
                select_rows(cache, torch.tensor(kept))
            rows = len(kept)
            assert all(torch.equal(a.keys, b.keys) for a, b in zip(ours.layers, theirs.layers, strict=True))


def test_a_token_copies_nothing_that_came_before() -> None:
    cache: DynamicCache = new_cache(CONFIG, growing=True)
    places = []
    for step in range(LEAST_ROOM):
        keys, _ = cache.update(*states(2, 4 if step == 0 else 1, step), 0)
        places.append(keys.data_ptr())
    assert len(set(places[1:])) == 1
