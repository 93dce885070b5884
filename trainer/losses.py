"""Policy losses over flat streams of completion tokens. Pure functions: tensors in, tensors out.

A batch's completions are concatenated without padding. Each loss returns a value per token; :func:`token_weights`
gives the weight of each token, so that micro-batches can simply be summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..manifests.import_path import load_object

Aggregation = Literal["sequence", "token", "constant"]
KLEstimator = Literal["k1", "k2", "k3"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Captions = Literal["sampled", "best", "given"]


@dataclass(frozen=True)
class Tokens:
    """Completion tokens of some rows, all (tokens,).

    ``logp``: log-probability under the policy, with its gradient; ``old``: before the update, or when they were sampled
    if nothing corrects for the difference; ``advantages``: per token; ``row``: index of a token's completion, 0 to
    ``rows`` - 1.
    """

    logp: Tensor
    old: Tensor
    advantages: Tensor
    row: Tensor
    rows: int


@dataclass(frozen=True)
class ClipRange:
    """Ratios are clipped to ``1 - low`` … ``1 + high``; ``cap``: largest weight of a token in CISPO."""

    low: float = 0.2
    high: float = 0.2
    cap: float = 5.0


def clipped(tokens: Tokens, clip: ClipRange) -> Tensor:
    """Per token, -min(r A, clip(r) A) with r the token's probability ratio (PPO, arXiv 1707.06347 eq. 7). (tokens,)."""
    return _pessimistic((tokens.logp - tokens.old).exp(), tokens.advantages, clip)


def sequence_clipped(tokens: Tokens, clip: ClipRange) -> Tensor:
    """Like :func:`clipped`, with one ratio per completion: its tokens' geometric mean (GSPO, arXiv 2507.18071 eq. 7).

    (tokens,); all tokens of a completion have the same value.
    """
    lengths = tokens.row.bincount(minlength=tokens.rows).clamp(min=1)
    difference = tokens.logp - tokens.old
    means = torch.zeros(tokens.rows, dtype=difference.dtype, device=difference.device)
    means = means.index_add(0, tokens.row, difference) / lengths
    return _pessimistic(means.exp()[tokens.row], tokens.advantages, clip)


def cispo(tokens: Tokens, clip: ClipRange) -> Tensor:
    """-min(r, cap) A log p, no gradient through the weight; clips no token out (arXiv 2506.13585 eq. 4). (tokens,)."""
    weight = (tokens.logp - tokens.old).exp().clamp(max=clip.cap).detach()
    return -weight * tokens.advantages * tokens.logp


def policy_gradient(tokens: Tokens, clip: ClipRange) -> Tensor:
    """-A log p, the actor's part of A2C (arXiv 1602.01783). (tokens,).

    For tokens sampled from the policy itself: ``old`` is not used. Others need :func:`correction_weights`.
    """
    return -tokens.advantages * tokens.logp


def _pessimistic(ratio: Tensor, advantages: Tensor, clip: ClipRange) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip.low, 1 + clip.high) * advantages)


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss: its value per token, (tokens,), and how tokens are averaged.

    ``captions`` it is computed on: all ``sampled`` ones, with their advantages; only the ``best`` of each group; or
    those ``given`` in an artifact, without rollouts and rewards. Advantages of the last two are 1.
    """

    of_token: Callable[[Tokens, ClipRange], Tensor]
    aggregation: Aggregation
    captions: Captions = "sampled"


LOSSES: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(clipped, "sequence"),  # arXiv 2402.03300 eq. 3
    "dr_grpo": PolicyLoss(clipped, "constant"),  # arXiv 2503.20783: no length bias
    "dapo": PolicyLoss(clipped, "token"),  # arXiv 2503.14476 eq. 8, with clip.high above clip.low
    "gspo": PolicyLoss(sequence_clipped, "sequence"),
    "cispo": PolicyLoss(cispo, "token"),
    "ppo": PolicyLoss(clipped, "token"),
    "a2c": PolicyLoss(policy_gradient, "token"),
    # With advantages of 1 the policy gradient's loss is the negative log-likelihood.
    "best_of_n": PolicyLoss(policy_gradient, "token", "best"),  # RAFT, arXiv 2304.06767
    "sft": PolicyLoss(policy_gradient, "token", "given"),
}


def find_loss(name: str) -> PolicyLoss:
    """A built-in loss, or a :class:`PolicyLoss` by import path. Raises ValueError if there is none."""
    if ":" not in name:
        if name not in LOSSES:
            raise ValueError(f"there is no loss {name!r}; take {', '.join(LOSSES)} or package.module:name")
        return LOSSES[name]
    loss = load_object(name)
    if not isinstance(loss, PolicyLoss):
        raise ValueError(f"{name}: is no loss, a capipe.trainer.losses.PolicyLoss")
    return loss


@dataclass(frozen=True)
class Totals:
    """Denominators over a whole update and all processes: completions, their tokens, the length limit."""

    rows: int
    tokens: int
    limit: int


def token_weights(row: Tensor, lengths: Tensor, how: Aggregation, totals: Totals) -> Tensor:
    """Weight of each token, (tokens,). ``row``: as in :class:`Tokens`; ``lengths``: (rows,), of whole completions.

    ``sequence``: the mean over completions of the mean over their tokens; ``token``: over all tokens; ``constant``: the
    sum over tokens by completions times the length limit.
    """
    if how == "sequence":
        return 1.0 / (totals.rows * lengths.clamp(min=1).float()[row])
    count = totals.tokens if how == "token" else totals.rows * totals.limit
    return torch.full(row.shape, 1.0 / max(count, 1), device=row.device)


def kl_tokens(logp: Tensor, ref: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates of KL(policy || reference) from each sampled token, (tokens,) (Schulman 2020, "Approximating KL").

    As values: k1 = log p - log q is unbiased, k2 = k1² / 2 has low variance, k3 = q/p - 1 - log q/p has both properties
    and is never negative. k2 is close to the divergence only where that is small; far from the reference it is several
    times as large. So logs and alarms take k3. As losses, without a ratio (arXiv 2402.03300 eq. 4): on average k2 has
    the gradient of KL(policy || reference), k3 that of KL(reference || policy), and k1 none: it is a diagnostic.
    These are gradients of each token's divergence given the tokens before it. That a token also decides which states
    follow, and how far from the reference these are, has no part in them; it has in a penalty in the reward
    (k1 per token, :func:`.policy.critic.token_rewards`), whose expectation is the divergence of whole completions.
    """
    difference = logp - ref
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference


@dataclass(frozen=True)
class Correction:
    """Correction for captions that something else than the policy sampled: another engine, older weights.

    ``mode``: a weight per token or per sequence (completion), truncated at ``cap`` or set to 0 above it.
    """

    mode: CorrectionMode = "sequence_mask"
    cap: float = 3.0

    @property
    def by_sequence(self) -> bool:
        return self.mode in ("sequence_truncate", "sequence_mask")


def correction_weights(
    logp: Tensor, sampled: Tensor, row: Tensor, rows: int, correction: Correction
) -> tuple[Tensor, Tensor]:
    """Importance weights of tokens (tokens,), and which ratios were above the cap: (rows,) by sequence, else (tokens,).

    ``logp``: log-probability (tokens,) under the policy before the update; ``sampled``: under the distribution that the
    tokens were sampled from; ``row``, ``rows``: as in :class:`Tokens`. The ratio is exp(logp - sampled) of a token, or
    the product of a completion's, which all of its tokens get. The policy loss is multiplied by the weights, the terms
    of KL, value and entropy are not. Truncated importance sampling (Ionides 2008; for rollouts Yao et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training"); the modes of TRL's
    ``vllm_importance_sampling_mode``, its default cap, and no lower bound.
    """
    difference = logp - sampled
    if correction.by_sequence:
        difference = torch.zeros(rows, dtype=difference.dtype, device=difference.device).index_add(0, row, difference)
    ratio = difference.exp()
    capped = ratio > correction.cap
    weights = ratio.clamp(max=correction.cap)
    if correction.mode in ("token_mask", "sequence_mask"):
        weights = ratio.masked_fill(capped, 0.0)
    return (weights[row] if correction.by_sequence else weights), capped


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of the value head, per token; all (tokens,).

    With ``clip``: the larger of the errors with and without clipping the change since sampling to ``clip``.
    """
    errors = (values - returns).square()
    if clip is not None:
        clipped_values = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (clipped_values - returns).square())
    return errors / 2
