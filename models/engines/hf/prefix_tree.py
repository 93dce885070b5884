"""Prefix sharing within a batch: which common prefixes to compute once, for the fewest padded tokens. Pure.

A plan is a list of levels, each one padded forward pass. The last level holds the own suffix of every prompt, the ones
before it the prefixes that those suffixes continue.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

# Cost of one more forward pass besides its tokens (launches, selecting cache rows), in tokens. A pass over one token of
# a small model on a CPU takes as long as some 60 in a batch; the rest is for copying the cache.
PASS_TOKENS = 128
FEWER = 0.6  # a level leaves at most this share of its rows to earlier ones: keeps passes few and the search short


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start`` to ``end`` of prompt ``of``, and of all others that share them up to ``end``.

    ``parent``: index of the segment of the previous level that ends at ``start``; None where ``start`` is 0.
    """

    of: int
    start: int
    end: int
    parent: int | None


Level = list[Segment]


@dataclass(frozen=True, slots=True)
class _Split:
    """Cut positions of sorted sequences, the prefix that each continues, and how those prefixes are split."""

    cost: int
    cuts: list[int]
    parents: list[int | None]
    before: _Split | None


def unshared(lengths: Sequence[int]) -> list[Level]:
    """The plan that computes every prompt separately, in one pass."""
    return [[Segment(index, 0, length, None) for index, length in enumerate(lengths)]]


def cost(levels: Sequence[Level]) -> int:
    """Tokens that a plan computes, including padding and the cost of passes."""
    return sum(PASS_TOKENS + len(level) * max(segment.end - segment.start for segment in level) for level in levels)


def plan(prompts: Sequence[Sequence[int]]) -> list[Level]:
    """The levels for prompts of at least one token each; the last has a segment per prompt, in the prompts' order.

    Equal numbers must stand for equal inputs. The last token of a prompt is always in its own segment, and the cost is
    never above that of :func:`unshared`.
    """
    order = sorted(range(len(prompts)), key=lambda index: tuple(prompts[index]))
    ordered = [np.asarray(prompts[index], dtype=np.int64) for index in order]
    lengths = [len(prompt) for prompt in ordered]
    common = [0, *(_common(one, other) for one, other in pairwise(ordered))]
    split = _best(lengths, common)
    levels = _levels(split, list(range(len(prompts))), lengths)
    levels = [[replace(segment, of=order[segment.of]) for segment in level] for level in levels]
    levels[-1].sort(key=lambda segment: segment.of)
    return levels


def _common(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> int:
    """Length of the prefix that two sequences share, the last token of either excluded."""
    size = min(len(one), len(other)) - 1
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if len(differs) else size


def _best(lengths: list[int], common: list[int], budget: float = float("inf")) -> _Split:
    """The cheapest split of sorted sequences; ``common[i]``: tokens that ``i`` shares with its predecessor.

    For a given width of the last level, the cheapest cut of each sequence is the shallowest branching that leaves at
    most that width: it has the fewest and shortest prefixes. So only widths have to be tried; the prefixes that a width
    leaves are the same problem again. Above ``budget`` the split need not be the cheapest.
    """
    rows, longest = len(lengths), max(lengths)
    best = _Split(PASS_TOKENS + rows * longest, [0] * rows, [None] * rows, None)
    budget = min(budget, best.cost)
    branchings = _branchings(common)
    widths = sorted({size - depth for size, depths in zip(lengths, branchings, strict=True) for depth, _ in depths})
    fewest = float(rows)
    for width in widths:
        if 2 * PASS_TOKENS + rows * width + longest - width >= budget:
            break
        beginnings = [_beginning(at, lengths[at] - width, depths) for at, depths in enumerate(branchings)]
        kept = sorted({pair for pair in beginnings if pair[1] > 0})
        if not 0 < len(kept) <= FEWER * fewest:
            continue
        fewest = len(kept)
        own = PASS_TOKENS + rows * max(size - cut for size, (_, cut) in zip(lengths, beginnings, strict=True))
        before = _best([cut for _, cut in kept], _common_of(kept, common), budget - own)
        if own + before.cost < budget:
            index = {pair: number for number, pair in enumerate(kept)}
            budget = own + before.cost
            best = _Split(budget, [cut for _, cut in beginnings], [index.get(pair) for pair in beginnings], before)
    return best


def _branchings(common: list[int]) -> list[list[tuple[int, int]]]:
    """Per sequence, the depths at which it branches off, ascending from 0, with the first sequence sharing each."""
    branchings: list[list[tuple[int, int]]] = [[] for _ in common]
    opened = [(0, 0)]
    for at, depth in enumerate([*common[1:], 0], start=1):
        first = at - 1
        while opened[-1][0] > depth:
            inner, first = opened.pop()
            for member in range(first, at):
                branchings[member].append((inner, first))
        if opened[-1][0] < depth:
            opened.append((depth, first))
    return [[(0, 0), *reversed(pairs)] for pairs in branchings]


def _beginning(at: int, least: int, branchings: list[tuple[int, int]]) -> tuple[int, int]:
    """The prefix of at least ``least`` tokens that most share, as (first sequence that has it, its length)."""
    index = bisect_left(branchings, (least, -1))
    if index == len(branchings):
        return at, least  # not shared: a prefix of its own, which saves padding in the last level
    depth, first = branchings[index]
    return first, depth


def _common_of(kept: list[tuple[int, int]], common: list[int]) -> list[int]:
    """Tokens that each prefix shares with its predecessor, its last token excluded."""
    shared = [0]
    for (one, size), (other, other_size) in pairwise(kept):
        between = min(common[one + 1 : other + 1], default=size)
        shared.append(min(between, size - 1, other_size - 1))
    return shared


def _levels(split: _Split, of: list[int], lengths: list[int]) -> list[Level]:
    """The split's levels in order; ``of``: the prompt that each of its sequences is a prefix of."""
    level = [Segment(*values) for values in zip(of, split.cuts, lengths, split.parents, strict=True)]
    if split.before is None:
        return [level]
    first = {parent: at for at, parent in reversed(list(enumerate(split.parents))) if parent is not None}
    members = [first[number] for number in range(len(first))]
    before = _levels(split.before, [of[at] for at in members], [split.cuts[at] for at in members])
    return [*before, level]
