"""Sampling whose draws are a pure function of (seed, position): Gumbel noise from a counter instead of a generator.

``argmax(logits / temperature + gumbel)`` is a sample of ``softmax(logits / temperature)``. With the noise hashed from
``(seed, position, token id)`` the same request draws the same tokens in every engine, whatever shares its batch, and
no request needs a generator of its own (a ``torch.Generator`` per request makes vLLM 30 times slower on a CPU).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Odd multipliers of published mixers, as the signed integers that torch wants: splitmix64's for the 64-bit row key,
# MurmurHash3's 32-bit finaliser for each token. Integer tensors wrap around on overflow, as these mixers need.
_GOLDEN_64 = 0x9E3779B97F4A7C15 - (1 << 64)
_SPLITMIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_SPLITMIX_2 = 0x94D049BB133111EB - (1 << 64)
_GOLDEN_32 = 0x9E3779B1 - (1 << 32)
_MURMUR_1 = 0x85EBCA6B - (1 << 32)
_MURMUR_2 = 0xC2B2AE35 - (1 << 32)
_BITS = 31  # of the token hash that become the uniform variate
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24  # in float32


def fold_seed(seed: int) -> int:
    """Any integer as a signed 64-bit one (modulo 2**64), which is what tensors and vLLM's messages can carry."""
    folded = seed & (1 << 64) - 1
    return folded - (1 << 64) if folded >= 1 << 63 else folded


def vision_ids(config: Any) -> list[int]:
    """The tokens that stand for pixels or frame them, of a model that has any: never to be generated."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return sorted({getattr(config, name) for name in names if getattr(config, name, None) is not None})


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int, device: torch.device | str) -> Tensor:
    """Standard Gumbel noise, float32 ``(rows, vocab_size)`` on ``device``; finite everywhere.

    ``seeds``, ``positions``: int64 ``(rows,)``; the position is the number of tokens the row has drawn before.
    """
    device = torch.device(device)
    key = _row_keys(seeds.to(device), positions.to(device))
    low = key.bitwise_and(0xFFFFFFFF)
    low = torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)  # the same 32 bits, as a signed number
    high = (key >> 32).to(torch.int32)
    hashed = torch.arange(vocab_size, dtype=torch.int32, device=device).mul_(_GOLDEN_32) + low[:, None]
    # Two rounds with one half of the key each: after one, rows whose keys are near would repeat each other shifted.
    hashed = _mix32_(_mix32_(hashed).bitwise_xor_(high[:, None]))
    uniform = hashed.bitwise_and_((1 << _BITS) - 1).to(torch.float32)
    # The noise of rare, large values must be fine-grained (they decide draws from a flat distribution over a large
    # vocabulary), so it is taken from the variate's end near 0, where float32 is dense, not from the one near 1.
    uniform.add_(0.5).mul_(2.0**-_BITS).clamp_(max=_LARGEST_BELOW_ONE)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def apply(logits: Tensor, seeds: Tensor, positions: Tensor, temperatures: Tensor, top_ps: Tensor | None) -> Tensor:
    """Float32 ``(rows, vocab)`` whose argmax is each row's sample. Rows of temperature 0 come back as they were.

    ``seeds``, ``positions``: int64 ``(rows,)``; ``temperatures``, ``top_ps``: float32 ``(rows,)``, temperature first.
    ``top_ps=None`` says that every row has full support, which saves sorting. Nothing here waits for the device.
    """
    noise = gumbel_noise(seeds, positions, logits.shape[-1], logits.device)
    return with_noise(logits, noise, temperatures, top_ps)


def with_noise(logits: Tensor, noise: Tensor, temperatures: Tensor, top_ps: Tensor | None) -> Tensor:
    """As :func:`apply`, with the noise ``(rows, vocab)`` that was made before."""
    logits = logits.float()
    greedy = (temperatures <= 0)[:, None]
    scaled = logits / torch.where(greedy, 1.0, temperatures[:, None])
    if top_ps is not None:
        scaled = _keep_nucleus(scaled, top_ps)
    return torch.where(greedy, logits, scaled + noise)


def _keep_nucleus(logits: Tensor, top_ps: Tensor) -> Tensor:
    """``logits`` with -inf outside each row's smallest set of likeliest tokens that holds ``top_p`` of probability."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability  # held by the likelier ones alone; 0 for the first, always kept
    full = top_ps[:, None] >= 1.0  # rounding in the sum must not cut the tail of a row that asked for all of it
    return logits.scatter(-1, order, ordered.masked_fill((before >= top_ps[:, None]) & ~full, -math.inf))


def _row_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """One well mixed int64 key per row; the seed is mixed first, so that near seeds and positions share nothing."""
    return _mix64(_mix64(seeds + _GOLDEN_64) + (positions + 1) * _GOLDEN_64)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30, 64)) * _SPLITMIX_1
    x = (x ^ _logical_shift(x, 27, 64)) * _SPLITMIX_2
    return x ^ _logical_shift(x, 31, 64)


def _mix32_(x: Tensor) -> Tensor:
    x.bitwise_xor_(_logical_shift(x, 16, 32)).mul_(_MURMUR_1)
    x.bitwise_xor_(_logical_shift(x, 13, 32)).mul_(_MURMUR_2)
    return x.bitwise_xor_(_logical_shift(x, 16, 32))


def _logical_shift(x: Tensor, by: int, width: int) -> Tensor:
    """``x >> by`` filled with zeros: torch's own shift of signed integers repeats the sign bit."""
    return (x >> by) & ((1 << (width - by)) - 1)
