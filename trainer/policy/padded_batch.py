"""Slow twin of :func:`.batch.pack`: rows padded to the longest prompt, completion, and number of completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Batch, Group, flat_targets
from .packing.padded import padded_tree


def pack_padded(groups: Sequence[Group], device: torch.device | str = "cpu") -> Batch:
    """As :func:`.batch.pack`, in rows padded to the longest prompt, the most completions and the longest of these."""
    prefix = max(len(group.prompt.ids) for group in groups)
    branches = max(len(group.completions) for group in groups)
    length = max(len(completion.token_ids) for group in groups for completion in group.completions) - 1
    columns = prefix + branches * length
    ids = torch.zeros(len(groups), columns, dtype=torch.long)
    positions = torch.zeros(groups[0].prompt.positions.shape[0], len(groups), columns, dtype=torch.long)
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
    tree = padded_tree(inside.to(device), branches, length)
    prompts = [group.prompt for group in groups]
    return Batch(
        prompts,
        ids.to(device),
        positions.to(device),
        tree,
        torch.cat(predicts).to(device),
        *flat_targets(groups, device),
    )
