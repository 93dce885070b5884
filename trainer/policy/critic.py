"""Value head, GAE targets and per-token advantages (PPO, A2C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..advantages import gae
from .batch import Group


@dataclass(frozen=True)
class CriticConfig:
    """``gamma``, ``lam``: of GAE; ``weight``: of the value loss; ``clip``: largest change of a value in an update.

    ``whiten``: advantages of a step get mean 0 and standard deviation 1; ``detach``: the head learns from hidden states
    without changing them.
    """

    gamma: float = 1.0
    lam: float = 0.95
    weight: float = 0.5
    clip: float | None = None
    whiten: bool = True
    detach: bool = False


class ValueHead(nn.Module):
    """Predicts the sum of future rewards from the policy's last hidden state before a token. Initialised to 0.

    Linear, or two layers if ``hidden``, the width of the first, is given.
    """

    def __init__(self, width: int, detach: bool = False, hidden: int | None = None) -> None:
        super().__init__()
        self.detach = detach
        self.first = nn.Identity() if hidden is None else _first_layer(width, hidden)
        self.linear = nn.Linear(hidden or width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(tokens, width) -> float32 (tokens,)."""
        seen = hidden.detach() if self.detach else hidden
        values: Tensor = self.linear(self.first(seen.to(self.linear.weight.dtype)))[:, 0].float()
        return values


def _first_layer(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU())


@dataclass
class Targets:
    """Training targets of a group's completion tokens, all float32 (tokens,).

    ``old``: log-probability that ratios are taken against; ``values``: before the update; ``returns``: targets of the
    values; ``scored``: 1 if the completion has a score, else 0; ``weights``: corrections for whoever sampled, None
    without one; ``reference``: log-probability under the reference, None without one.
    """

    old: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    scored: Tensor
    weights: Tensor | None = None
    reference: Tensor | None = None


def joined(targets: Sequence[Targets]) -> Targets:
    """Targets of several groups as one."""

    def column(name: str) -> Tensor | None:
        parts = [getattr(target, name) for target in targets]
        return None if parts[0] is None else torch.cat(parts)

    return Targets(**{each.name: column(each.name) for each in fields(Targets)})  # type: ignore[arg-type]


def token_rewards(group: Group, scores: Tensor, penalties: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Reward of each token of a group's completions, and whether its completion was scored, both (tokens,).

    ``scores``: (completions,), NaN if unscored. ``penalties``: (tokens,), taken off beside the score: of a KL term in
    the reward, beta (log p - log q) of each token (arXiv 1909.08593 eq. 2; TRL's PPO until 2024). An unscored
    completion has neither.
    Per-token rewards stay at their tokens; the rest of a completion's score goes to its last token.
    """
    earned, scored = [], []
    for completion, reward, score in zip(group.completions, group.rewards, scores.tolist(), strict=True):
        row = torch.zeros(len(completion.token_ids))
        known = not math.isnan(score)
        if known:
            if reward.per_token:
                row += torch.tensor(reward.per_token)
            row[-1] += score - float(row.sum())
        earned.append(row)
        scored.append(torch.full_like(row, float(known)))
    rewards, known_tokens = torch.cat(earned), torch.cat(scored)
    return (rewards if penalties is None else rewards - penalties.to(rewards) * known_tokens), known_tokens


def targets_of(
    group: Group,
    scores: Tensor,
    old: Tensor,
    values: Tensor,
    config: CriticConfig,
    penalties: Tensor | None = None,
) -> Targets:
    """GAE over a group's completions; ``old``, ``values``: (tokens,), detached.

    ``scores``, ``penalties``: as in :func:`token_rewards`. An unscored completion has advantages of 0.
    """
    earned, scored = (tensor.to(values) for tensor in token_rewards(group, scores, penalties))
    lengths = torch.tensor([len(completion.token_ids) for completion in group.completions], device=values.device)
    rewards, expected = (
        pad_sequence(list(tensor.split(lengths.tolist())), batch_first=True) for tensor in (earned, values)
    )
    advantages, returns = gae(rewards, expected, lengths, config.gamma, config.lam)
    inside = torch.arange(rewards.shape[1], device=values.device) < lengths[:, None]
    return Targets(old, values, advantages[inside] * scored, returns[inside], scored)


def whitened(targets: list[Targets], sums: Tensor) -> None:
    """Normalise all scored advantages to mean 0 and standard deviation 1, in place.

    ``sums``: :func:`moments` (count, sum, sum of squares) summed over all processes.
    """
    count, total, squares = sums.tolist()
    if count < 2:
        return
    mean = total / count
    deviation = max(0.0, (squares - count * mean * mean) / (count - 1)) ** 0.5
    for target in targets:
        target.advantages = (target.advantages - mean) / (deviation + 1e-8) * target.scored


def moments(targets: list[Targets]) -> Tensor:
    """Count, sum and sum of squares of the scored advantages, float64 (3,)."""
    known = torch.cat(
        [torch.zeros(0).double(), *(target.advantages[target.scored > 0].double().cpu() for target in targets)]
    )
    return torch.stack([torch.tensor(float(len(known)), dtype=torch.float64), known.sum(), known.square().sum()])
