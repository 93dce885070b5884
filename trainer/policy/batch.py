"""Groups (an image's completions with their rewards), and their packing into a model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...models.engines.base import Completion
from ...models.engines.hf.model_adapter import PreparedPrompt
from .tree_attention import Tree, make_tree


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
    """Some groups as one packed input; columns: ``[prompt | completion 1 | ...]``, see :class:`.tree_attention.Tree`.

    ``ids``: (groups, columns); ``positions``: (axes, groups, columns); ``predicts``: (tokens,), for each completion
    token the index, in the flattened hidden states (groups x columns), of the state that predicts it; ``targets``,
    ``row``: (tokens,), the token and the index of its completion; ``lengths``: (completions,).
    """

    prompts: list[PreparedPrompt]
    ids: Tensor
    positions: Tensor
    tree: Tree
    predicts: Tensor
    targets: Tensor
    row: Tensor
    lengths: Tensor


def pack(groups: Sequence[Group], device: torch.device | str = "cpu") -> Batch:
    """Pack groups into one batch, with all their completions; groups may differ in all lengths.

    Raises ValueError if a group has no completion, or an empty one.
    """
    if any(not group.completions or min(len(item.token_ids) for item in group.completions) < 1 for group in groups):
        raise ValueError("a group without completions, or with one that has no token, cannot be packed")
    prefix = max(len(group.prompt.ids) for group in groups)
    branches = max(len(group.completions) for group in groups)
    length = (
        max(len(completion.token_ids) for group in groups for completion in group.completions) - 1
    )  # the last token predicts nothing
    columns = prefix + branches * length
    axes = groups[0].prompt.positions.shape[0]
    ids = torch.zeros(len(groups), columns, dtype=torch.long)
    positions = torch.zeros(axes, len(groups), columns, dtype=torch.long)
    inside = torch.zeros(len(groups), prefix, dtype=torch.bool)
    predicts: list[Tensor] = []
    for number, group in enumerate(groups):
        at = prefix - len(group.prompt.ids)
        inside[number, at:], ids[number, at:prefix] = True, group.prompt.ids
        positions[:, number, at:prefix] = group.prompt.positions
        for branch, completion in enumerate(group.completions):
            start, read = prefix + branch * length, len(completion.token_ids) - 1
            ids[number, start : start + read] = torch.tensor(completion.token_ids[:-1], dtype=torch.long)
            positions[:, number, start : start + read] = group.prompt.next_position + torch.arange(read)
            places = torch.cat([torch.tensor([prefix - 1]), torch.arange(start, start + read)])
            predicts.append(places + number * columns)
    completions = [completion for group in groups for completion in group.completions]
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    targets = torch.tensor([token for completion in completions for token in completion.token_ids])
    row = torch.arange(len(completions)).repeat_interleave(lengths)
    return Batch(
        [group.prompt for group in groups],
        ids.to(device),
        positions.to(device),
        make_tree(inside.to(device), branches, length),
        torch.cat(predicts).to(device),
        targets.to(device),
        row.to(device),
        lengths.to(device),
    )


def micro_batches(groups: Sequence[Group], budget: int) -> list[list[Group]]:
    """Micro-batches of groups of similar size, each within ``budget`` packed columns, or a single group.

    Longest first, so that running out of memory fails at once. The sort is stable.
    """
    ordered = sorted(groups, key=_columns, reverse=True)
    batches: list[list[Group]] = []
    for group in ordered:
        if batches and packed_columns([*batches[-1], group]) <= budget:
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches


def packed_columns(groups: Sequence[Group]) -> int:
    """Number of tokens in a packed batch, including padding."""
    prefix = max(len(group.prompt.ids) for group in groups)
    branches = max(len(group.completions) for group in groups)
    length = max(len(completion.token_ids) for group in groups for completion in group.completions)
    return len(groups) * (prefix + branches * (length - 1))


def _columns(group: Group) -> int:
    return packed_columns([group])
