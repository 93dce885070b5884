"""Advantages from rewards: baselines within a group, or GAE with a value head. Pure functions.

Rewards of a group are (completions,); NaN marks an unscored completion. It is left out of every baseline, and its
advantage is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["group_std", "group_mean", "leave_one_out"]
EPSILON = 1e-4  # added to a standard deviation in a denominator, as in TRL and OpenRLHF
TIED = 1e-6  # smaller differences of rewards are rounding errors


def advantages(rewards: Tensor, baseline: Baseline) -> Tensor:
    """Advantages of a group's completions, (completions,).

    ``group_std``: (r - mean) / std, unbiased std (GRPO, arXiv 2402.03300 §4.1.2); ``group_mean``: r - mean
    (Dr. GRPO, arXiv 2503.20783); ``leave_one_out``: r - mean of the others (RLOO, arXiv 2402.14740 eq. 7). A group with
    fewer than two scored completions, or with all scores equal, has no gradient: zeros.
    """
    scored = ~rewards.isnan()
    count = int(scored.sum())
    if tied(rewards):
        return torch.zeros_like(rewards)
    centred = torch.where(scored, rewards - rewards[scored].mean(), 0.0)
    if baseline == "leave_one_out":
        return centred * (count / (count - 1))
    if baseline == "group_std":
        return centred / (rewards[scored].std() + EPSILON)
    return centred


def best_only(rewards: Tensor) -> Tensor:
    """1 for a group's best completion, 0 for the others, (completions,): rejection sampling (RAFT, arXiv 2304.06767).

    The first of several best ones. A group with fewer than two scored completions, or with all scores equal, has none.
    """
    chosen = torch.zeros_like(rewards)
    if not tied(rewards):
        chosen[rewards.nan_to_num(nan=-math.inf).argmax()] = 1.0
    return chosen


def tied(rewards: Tensor) -> bool:
    """Whether a group's scores are all equal, or fewer than two, so that its advantages are zero."""
    known = rewards[~rewards.isnan()]
    return len(known) < 2 or float(known.max() - known.min()) < TIED


@dataclass(frozen=True)
class RewardTerm:
    """A reward's term in the sum: multiplied by ``weight``, after normalisation within its group if ``normalise``."""

    weight: float = 1.0
    normalise: bool = False


def combine(components: Mapping[str, Tensor], terms: Mapping[str, RewardTerm]) -> Tensor:
    """Weighted sum of a group's reward components, each (completions,); NaN where any component is unscored (NaN).

    A component is normalised before summing (arXiv 2605.07394) so that none dominates the others by its spread alone.
    """
    total: Tensor | None = None
    for name, values in components.items():
        term = terms[name]
        weighted = term.weight * (normalised(values) if term.normalise else values)
        total = weighted if total is None else total + weighted
    if total is None:
        raise ValueError("there is no reward to combine")
    return total


def normalised(values: Tensor) -> Tensor:
    """Values with mean 0 and standard deviation 1, (completions,); zeros if all are equal. NaN is ignored and kept."""
    result = advantages(values, "group_std")
    return torch.where(values.isnan(), values, result)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of padded rows, each (rows, longest) (arXiv 1506.02438 eq. 16); 0 beyond a row's length.

    ``rewards``, ``values``: (rows, longest), each token's reward, and the value predicted before it;
    ``lengths``: (rows,). No reward follows a completion's end. ``lam`` 1: returns are the discounted sums.
    """
    inside = torch.arange(rewards.shape[1], device=rewards.device) < lengths[:, None]
    rewards, values = rewards * inside, values * inside
    following = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], dim=1)
    errors = rewards + gamma * following - values
    result = torch.zeros_like(values)
    carried = torch.zeros_like(values[:, 0])
    for column in reversed(range(values.shape[1])):
        carried = errors[:, column] + gamma * lam * carried
        result[:, column] = carried
    result = result * inside
    return result, (result + values) * inside
