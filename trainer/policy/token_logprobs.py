"""Log-probabilities and entropies of given tokens, computed in chunks to limit the memory for logits.

A vocabulary of 152,000 times 3,200 completion tokens is 1.9 GB of logits in float32, and as much again for gradients;
with chunks that are recomputed in the backward pass, only one chunk is in memory. The gradients are written out, since
automatic differentiation of softmax and entropy takes seven tensors of that size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.engines.hf.mixed_precision import head_product, rounded_matmul

CHUNK_LOGITS = 1 << 26  # per chunk: 256 MB of float32
LEAST = -1e30  # logit of a banned id: its probability is 0, and 0 times its logarithm is 0, not NaN


@dataclass(frozen=True)
class _Options:
    temperature: float
    banned: Tensor | None
    rows: int  # of a chunk
    rounded: Tensor | None  # the head's matrix in the type of the product's factors


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
    ``dtype``: of the factors of the head's products, whose sums are float32.
    """
    rounded = None if dtype is None else weight.detach().to(dtype)  # once, not for every chunk
    options = _Options(temperature, banned, max(1, chunk_logits // len(weight)), rounded)
    logp, entropy = _TokenScores.apply(hidden, weight, bias, targets, options)
    return logp, entropy


class _TokenScores(torch.autograd.Function):
    """With z the logits, p their softmax and H its entropy: d log p_t / dz = 1_t - p, dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        parts = [
            _softmax(rows, weight, bias, ids, options)
            for rows, ids in zip(hidden.split(options.rows), targets.split(options.rows), strict=True)
        ]
        logp, entropy = (torch.cat([part[at] for part in parts]) for at in (0, 1))
        kept = [parts[0][2]] if len(parts) == 1 else []  # several chunks are computed again
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, *kept)
        ctx.options = options
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, *kept = ctx.saved_tensors
        options: _Options = ctx.options
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), options.rows):
            own = slice(start, start + options.rows)
            rows, ids = hidden[own], targets[own]
            chances = kept[0] if kept else _softmax(rows, weight, bias, ids, options)[2]
            of_logp, of_entropy = (None if grad is None else grad[own] for grad in grads)
            of_logits = _logits_gradient(chances, ids, entropy[own], of_logp, of_entropy).div_(options.temperature)
            if options.rounded is not None:
                factor = of_logits.to(options.rounded.dtype)
                of_hidden[own] = rounded_matmul(factor, options.rounded)
                if of_weight is not None:
                    of_weight += rounded_matmul(factor.T, rows.to(factor.dtype))
            else:
                of_logits = of_logits.to(weight.dtype)
                of_hidden[own] = of_logits @ weight
                if of_weight is not None:
                    of_weight.addmm_(of_logits.T, rows)
            if of_bias is not None:
                of_bias += of_logits.sum(dim=0)
        return of_hidden, of_weight, of_bias, None, None


def _softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets and entropies, (rows,), and all probabilities, (rows, vocabulary)."""
    logits = head_product(hidden, weight, bias, options.rounded).float()
    if options.temperature != 1:
        logits.div_(options.temperature)
    if options.banned is not None and len(options.banned):
        logits.index_fill_(1, options.banned, LEAST)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    chosen = logits.gather(1, targets[:, None])[:, 0]
    chances = logits.exp()
    total = chances.sum(dim=1)
    log_total = total.log()
    chances.div_(total[:, None])
    entropy = log_total - torch.bmm(chances[:, None], logits[..., None]).flatten()  # no third tensor of this size
    logp = chosen - log_total
    return logp.masked_fill(chosen < LEAST / 2, float("-inf")), entropy, chances


def _logits_gradient(
    chances: Tensor, targets: Tensor, entropy: Tensor, of_logp: Tensor | None, of_entropy: Tensor | None
) -> Tensor:
    """Gradient of the logits, (rows, vocabulary)."""
    if of_logp is None:
        gradient = torch.zeros_like(chances)
    else:
        gradient = chances * -of_logp[:, None]
        gradient.scatter_add_(1, targets[:, None], of_logp[:, None])
    if of_entropy is not None:
        gradient -= of_entropy[:, None] * (torch.special.xlogy(chances, chances) + chances * entropy[:, None])
    return gradient
