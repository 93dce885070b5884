"""Counter-based sampling, a pure function of (seed, position): Gumbel noise from a hash instead of a generator.

``argmax(logits / temperature + gumbel)`` is a sample of ``softmax(logits / temperature)``. With the noise hashed from
``(seed, position, token id)`` the same request samples the same tokens in every engine and any batch, and no request
needs a generator of its own (a ``torch.Generator`` per request makes vLLM 30 times slower on a CPU).

This is the torch implementation, for any device; :mod:`.gumbel_kernel` does the same in one pass over the logits, and
:func:`apply` uses it where it runs.
"""

from __future__ import annotations

import math
import os
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .gumbel_bits import BITS, GOLDEN_32, GOLDEN_64, LARGEST_BELOW_ONE, MURMUR_1, MURMUR_2, SPLITMIX_1, SPLITMIX_2


def fold_seed(seed: int) -> int:
    """Any integer as a signed 64-bit one (modulo 2**64), as tensors and vLLM's messages require."""
    folded = seed & (1 << 64) - 1
    return folded - (1 << 64) if folded >= 1 << 63 else folded


def vision_ids(config: Any) -> list[int]:
    """The tokens that stand for pixels or frame them, if the model has any: never to be generated."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return sorted({getattr(config, name) for name in names if getattr(config, name, None) is not None})


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int, device: torch.device | str) -> Tensor:
    """Standard Gumbel noise, float32 ``(rows, vocab_size)`` on ``device``; finite everywhere.

    ``seeds``, ``positions``: int64 ``(rows,)``; the position is the number of tokens the row has sampled before.
    """
    device = torch.device(device)
    key = _row_keys(seeds.to(device), positions.to(device))
    low = key.bitwise_and(0xFFFFFFFF)
    low = torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)  # the same 32 bits, as a signed number
    high = (key >> 32).to(torch.int32)
    hashed = torch.arange(vocab_size, dtype=torch.int32, device=device).mul_(GOLDEN_32) + low[:, None]
    # Two rounds with one half of the key each: after one, rows with close keys would be shifted copies of each other.
    hashed = _mix32_(_mix32_(hashed).bitwise_xor_(high[:, None]))
    uniform = hashed.bitwise_and_((1 << BITS) - 1).to(torch.float32)
    # Rare, large values of the noise must be fine-grained (they decide samples from a flat distribution over a large
    # vocabulary), so it is taken from the variate's end near 0, where float32 is dense, not from the one near 1.
    uniform.add_(0.5).mul_(2.0**-BITS).clamp_(max=LARGEST_BELOW_ONE)
    return uniform.neg_().log1p_().neg_().log_().neg_()


@lru_cache(maxsize=16)
def kernel_runs_on(device: torch.device) -> bool:
    """Whether Triton compiles and launches the kernel on ``device``: tried once. On CUDA a warning says why not.

    On a CPU only by Triton's interpreter, for tests: with ``TRITON_INTERPRET=1`` in the environment from the start.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        from .gumbel_kernel import add_noise

        one = torch.ones(1, dtype=torch.long, device=device)
        add_noise(torch.zeros(1, 16, device=device), one, one, one.float())
    except Exception as error:  # no Triton, no compiler for its launcher, a device too old: torch is used
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"the noise of sampling is made by torch, slower, as its kernel fails ({reason})", stacklevel=2)
        return False
    return True


def apply(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    top_ps: Tensor | None,
    barred: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Float32 ``(rows, vocab)`` whose argmax is each row's sample. Rows of temperature 0 are unchanged.

    ``seeds``, ``positions``: int64 ``(rows,)``; ``temperatures``, ``top_ps``: float32 ``(rows,)``, temperature first.
    ``top_ps=None`` means that every row has full support, which saves sorting. ``barred``: int64 ids that no row with a
    temperature samples. ``overwrite``: the result may be written into ``logits``. Never synchronises with the device.
    """
    if not kernel_runs_on(logits.device):
        return apply_in_torch(logits, seeds, positions, temperatures, top_ps, barred)
    from .gumbel_kernel import add_noise

    if top_ps is None:
        return add_noise(logits, seeds, positions, temperatures, barred, overwrite)
    tempered = scaled(logits, temperatures, top_ps, barred)
    return add_noise(tempered, seeds, positions, (temperatures > 0).float(), overwrite=True)


def apply_in_torch(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    top_ps: Tensor | None,
    barred: Tensor | None = None,
) -> Tensor:
    """:func:`apply` without the kernel; the kernel is tested against it."""
    noise = gumbel_noise(seeds, positions, logits.shape[-1], logits.device)
    return with_noise(logits, noise, temperatures, top_ps, barred)


def with_noise(
    logits: Tensor, noise: Tensor, temperatures: Tensor, top_ps: Tensor | None, barred: Tensor | None = None
) -> Tensor:
    """Like :func:`apply_in_torch`, with precomputed noise ``(rows, vocab)``."""
    tempered = scaled(logits, temperatures, top_ps, barred)
    return torch.where((temperatures <= 0)[:, None], tempered, tempered + noise)


NO_TOKEN = -1  # padding before a row's first token


def penalise_(logits: Tensor, history: Tensor, penalties: Tensor) -> None:
    """Divide the logits of tokens in each row's history by its penalty, or multiply where negative; in place.

    ``history``: (rows, tokens), padded by NO_TOKEN, the last one a token; ``penalties``: (rows,). CTRL, arXiv
    1909.05858 §4.1, with the sign rule of transformers and vLLM.
    """
    seen = torch.where(history == NO_TOKEN, history[:, -1:], history)  # a token may count twice: once is written
    scores, factors = logits.gather(1, seen), penalties[:, None].to(logits.dtype)
    logits.scatter_(1, seen, torch.where(scores < 0, scores * factors, scores / factors))


def scaled(logits: Tensor, temperatures: Tensor, top_ps: Tensor | None = None, barred: Tensor | None = None) -> Tensor:
    """The logits that are sampled from, a new float32 matrix. Rows of temperature 0 are unchanged."""
    greedy = temperatures <= 0
    tempered = logits.float() / torch.where(greedy, 1.0, temperatures)[:, None]
    if barred is not None:
        columns = tempered.index_select(1, barred).masked_fill_(~greedy[:, None], -math.inf)
        tempered.index_copy_(1, barred, columns)
    return tempered if top_ps is None else _keep_nucleus(tempered, torch.where(greedy, 1.0, top_ps))


def _keep_nucleus(logits: Tensor, top_ps: Tensor) -> Tensor:
    """``logits`` with -inf outside each row's smallest set of most likely tokens with ``top_p`` of probability."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability  # that of the likelier tokens; 0 for the first, always kept
    full = top_ps[:, None] >= 1.0  # rounding in the sum must not cut the tail of a row that asked for all of it
    return logits.scatter(-1, order, ordered.masked_fill((before >= top_ps[:, None]) & ~full, -math.inf))


def _row_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """One well mixed int64 key per row; the seed is mixed first, so that close seeds and positions share nothing."""
    return _mix64(_mix64(seeds + GOLDEN_64) + (positions + 1) * GOLDEN_64)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30, 64)) * SPLITMIX_1
    x = (x ^ _logical_shift(x, 27, 64)) * SPLITMIX_2
    return x ^ _logical_shift(x, 31, 64)


def _mix32_(x: Tensor) -> Tensor:
    x.bitwise_xor_(_logical_shift(x, 16, 32)).mul_(MURMUR_1)
    x.bitwise_xor_(_logical_shift(x, 13, 32)).mul_(MURMUR_2)
    return x.bitwise_xor_(_logical_shift(x, 16, 32))


def _logical_shift(x: Tensor, by: int, width: int) -> Tensor:
    """``x >> by`` filled with zeros: torch's own shift of signed integers repeats the sign bit."""
    return (x >> by) & ((1 << (width - by)) - 1)
