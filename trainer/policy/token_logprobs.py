"""Log-probabilities and entropies of given tokens, computed in chunks to limit the memory for logits.

A vocabulary of 152,000 times 3,200 completion tokens is 1.9 GB of logits in float32, and as much again for gradients;
with chunks that are recomputed in the backward pass, only one chunk is in memory.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...models.engines.hf.mixed_precision import head_product

CHUNK_LOGITS = 1 << 26  # per chunk: 256 MB of float32


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, both float32 (tokens,), with gradients.

    ``hidden``: (tokens, width), inputs of the head; ``weight``: (vocabulary, width), the head's; ``targets``:
    (tokens,); ``banned``: ids that are never sampled and so have no probability; ``bias``: (vocabulary,), the head's;
    ``dtype``: of the factors of the head's product, whose sums are float32 (:func:`.head_product`).
    """
    size = max(1, chunk_logits // len(weight))
    rounded = None if dtype is None else weight.detach().to(dtype)  # once, not for every chunk
    if len(hidden) <= size:
        return _scores(hidden, weight, rounded, targets, temperature, banned, bias)
    parts = [
        cast(
            tuple[Tensor, Tensor],
            checkpoint(
                _scores,
                *(rows, weight, rounded, ids, temperature, banned, bias),
                use_reentrant=False,
                preserve_rng_state=False,
            ),
        )
        for rows, ids in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _scores(
    hidden: Tensor,
    weight: Tensor,
    rounded: Tensor | None,
    targets: Tensor,
    temperature: float,
    banned: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    logits = head_product(hidden, weight, bias, rounded).float() / temperature
    if banned is not None and len(banned):
        logits = logits.index_fill(1, banned, float("-inf"))
    logps = logits.log_softmax(dim=-1)
    chances = logps.exp()
    # 0 log 0 = 0: the product of 0 and -inf would be NaN.
    entropy = -(chances * logps.masked_fill(chances == 0, 0.0)).sum(dim=-1)
    return logps.gather(1, targets[:, None])[:, 0], entropy
