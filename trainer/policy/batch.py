"""Groups (an image's completions with their rewards), and their packing into a model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...models.engines.base import Completion
from ...models.engines.hf.model_adapter import PreparedPrompt
from .packing.tree import PaddedTree, Tree, lay_out


@dataclass
class RewardResult:
    """A caption's reward: ``score``, None if unscored; ``components`` by reward, before weights.

    ``per_token``: per-token parts of ``score`` (penalties that enter the returns where they occur), after weights;
    empty if there are none.
    """

    score: float | None
    components: dict[str, float | None] = field(default_factory=dict)
    per_token: list[float] = field(default_factory=list)
    details: dict[str, object] = field(default_factory=dict)  # for the log: answers, phrases found


@dataclass
class Group:
    """An image's prompt, its sampled completions, their rewards and advantages. ``key``: the image's name in its shard.

    ``failures``: reasons for captions that could not be sampled.
    """

    uid: str
    key: str
    prompt: PreparedPrompt
    completions: list[Completion] = field(default_factory=list)
    rewards: list[RewardResult] = field(default_factory=list)
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))  # (completions,)
    failures: list[str] = field(default_factory=list)

    def tokens(self) -> int:
        """Total number of completion tokens."""
        return sum(len(completion.token_ids) for completion in self.completions)


@dataclass(frozen=True)
class Batch:
    """Some groups as one packed input: a flat row, or padded rows (:mod:`.packing.padded`).

    ``ids``: (rows, columns); ``positions``: (axes, rows, columns); ``predicts``: (tokens,), for each completion
    token the index, in the flattened hidden states (rows x columns), of the state that predicts it; ``targets``,
    ``row``: (tokens,), the token and the index of its completion; ``lengths``: (completions,).
    """

    prompts: list[PreparedPrompt]
    ids: Tensor
    positions: Tensor
    tree: Tree | PaddedTree
    predicts: Tensor
    targets: Tensor
    row: Tensor
    lengths: Tensor


def pack(groups: Sequence[Group], device: torch.device | str = "cpu") -> Batch:
    """Pack groups into one flat row, with all their completions; groups may differ in all lengths.

    The last token of a completion predicts nothing and has no column.
    Raises ValueError if a group has no completion, or an empty one.
    """
    if any(not group.completions or min(len(item.token_ids) for item in group.completions) < 1 for group in groups):
        raise ValueError("a group without completions, or with one that has no token, cannot be packed")
    tree = lay_out([(len(group.prompt.ids), [len(c.token_ids) - 1 for c in group.completions]) for group in groups])
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    predicts: list[Tensor] = []
    for group, span in zip(groups, tree.spans, strict=True):
        ids.append(group.prompt.ids)
        positions.append(group.prompt.positions)
        last = torch.tensor([span.branch_start - 1])  # predicts the first token of every completion
        for completion, start in zip(group.completions, span.branch_starts(), strict=True):
            own = torch.arange(len(completion.token_ids) - 1)
            ids.append(torch.tensor(completion.token_ids[:-1], dtype=torch.long))
            positions.append((group.prompt.next_position + own).expand(len(group.prompt.positions), -1))
            predicts += [last, start + own]
    return Batch(
        [group.prompt for group in groups],
        torch.cat(ids)[None].to(device),
        torch.cat(positions, dim=1)[:, None].to(device),
        tree,
        torch.cat(predicts).to(device),
        *flat_targets(groups, device),
    )


def flat_targets(groups: Sequence[Group], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of all completions, the index of each token's completion, and the completions' lengths."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    targets = torch.tensor([token for completion in completions for token in completion.token_ids])
    row = torch.arange(len(completions)).repeat_interleave(lengths)
    return targets.to(device), row.to(device), lengths.to(device)


def micro_batches(groups: Sequence[Group], budget: int) -> list[list[Group]]:
    """Micro-batches of groups, each within ``budget`` packed columns, or a single group.

    Largest first, so that running out of memory fails at once. The sort is stable.
    """
    batches: list[list[Group]] = []
    for group in sorted(groups, key=_columns, reverse=True):
        if batches and packed_columns([*batches[-1], group]) <= budget:
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches


def packed_columns(groups: Sequence[Group]) -> int:
    """Number of columns of a packed batch."""
    return sum(map(_columns, groups))


def _columns(group: Group) -> int:
    return len(group.prompt.ids) + group.tokens() - len(group.completions)
