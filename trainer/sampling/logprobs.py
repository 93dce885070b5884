"""Log-probabilities with which captions were sampled, compared with those of the policy before an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics import Metrics
from ..policy.batch import Group


def sampled_logps(group: Group) -> Tensor:
    """Log-probabilities (tokens,) of a group's tokens when sampled. Raises ValueError if none were kept."""
    rows = [completion.logprobs for completion in group.completions]
    if any(row is None for row in rows):
        raise ValueError(f"{group.key}: captions of older weights need the log-probabilities they were sampled with")
    return torch.tensor([value for row in rows if row is not None for value in row])


def sampling_gaps(groups: Sequence[Group], logp: Tensor) -> Tensor:
    """|log-probability when sampled - ``logp``| of packed tokens, float64; only tokens with a kept one."""
    rows = [
        completion.logprobs or (float("nan"),) * len(completion.token_ids)
        for group in groups
        for completion in group.completions
    ]
    sampled = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    gaps = (sampled - logp.double().cpu()).abs()
    return gaps[~gaps.isnan()]


@dataclass(frozen=True)
class SamplingGap:
    """A micro-batch before the update: ``logp``, correction ``weights``, both (tokens,), ``capped``; see Correction.

    Kept on the device until the update is over: reading it synchronises. ``weight``: of the micro-batch in a step.
    """

    groups: list[Group]
    logp: Tensor
    weight: float
    weights: Tensor | None = None
    capped: Tensor | None = None


def sampling_metrics(gaps: Sequence[SamplingGap]) -> Metrics:
    """How far the policy before the update was from whoever sampled, over the tokens computed."""
    metrics = Metrics(("mismatch", "correction", "capped"))
    for gap in gaps:
        distances = sampling_gaps(gap.groups, gap.logp)
        metrics.add("mismatch", gap.weight * float(distances.sum()), gap.weight * len(distances))
        if gap.weights is not None and gap.capped is not None:
            metrics.add("correction", gap.weight * float(gap.weights.sum()), gap.weight * len(gap.weights))
            metrics.add("capped", gap.weight * float(gap.capped.sum()), gap.weight * len(gap.capped))
    return metrics
