"""Layout of packed groups: one flat row, for each group ``[prompt | branch 1 | branch 2 | ...]``, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Columns of one group. ``start``: first column of the prompt; ``prompt``: its columns.

    ``branches``: columns of each branch, one after another; 0 for a completion of one token, which predicts nothing.
    """

    start: int
    prompt: int
    branches: tuple[int, ...]

    @property
    def branch_start(self) -> int:
        return self.start + self.prompt

    @property
    def end(self) -> int:
        return self.branch_start + sum(self.branches)

    def branch_starts(self) -> list[int]:
        """First column of each branch."""
        starts, at = [], self.branch_start
        for length in self.branches:
            starts.append(at)
            at += length
        return starts


@dataclass(frozen=True)
class Run:
    """``count`` neighbouring sequences of ``length`` columns each, from column ``start``; none attends to another."""

    start: int
    count: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.count * self.length


@dataclass(frozen=True)
class Tree:
    """Columns of all groups of a flat row, in order."""

    spans: tuple[Span, ...]

    @property
    def columns(self) -> int:
        return self.spans[-1].end

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All prompts and branches, neighbouring branches of one length together."""
        return tuple(run for span in self.spans for run in _runs(span))

    @cached_property
    def branching(self) -> tuple[Span, ...]:
        """Spans with at least one column in their branches."""
        return tuple(span for span in self.spans if span.end > span.branch_start)

    @cached_property
    def own_starts(self) -> list[int]:
        """First column of every prompt and branch, and the end."""
        return [0, *(run.start + (number + 1) * run.length for run in self.runs for number in range(run.count))]

    @cached_property
    def after(self) -> Tensor:
        """Columns of all branches, (columns,)."""
        return torch.cat([torch.arange(span.branch_start, span.end) for span in self.branching])

    @cached_property
    def before(self) -> Tensor:
        """Columns of the prompts of those branches, (columns,)."""
        return torch.cat([torch.arange(span.start, span.branch_start) for span in self.branching])

    @cached_property
    def shared_starts(self) -> tuple[list[int], list[int]]:
        """First place of each group among :attr:`after` and :attr:`before`, and the end."""
        branches = accumulate((span.end - span.branch_start for span in self.branching), initial=0)
        prompts = accumulate((span.prompt for span in self.branching), initial=0)
        return list(branches), list(prompts)


@dataclass(frozen=True)
class PaddedTree:
    """Layout of padded rows, see :mod:`.padded`.

    ``prefix`` columns of prompt, then ``branches`` times ``length`` columns.
    ``prefix_mask``: bool (rows, 1, prefix, prefix); ``branch_mask``: bool (rows x branches, 1, length, prefix +
    length); true if a query may attend to a key.
    """

    prefix: int
    branches: int
    length: int
    prefix_mask: Tensor
    branch_mask: Tensor


def lay_out(sizes: Sequence[tuple[int, Sequence[int]]]) -> Tree:
    """Tree of groups, each given by its prompt's columns and those of its branches."""
    spans: list[Span] = []
    for prompt, branches in sizes:
        spans.append(Span(spans[-1].end if spans else 0, prompt, tuple(branches)))
    return Tree(tuple(spans))


def dense_mask(span: Span) -> Tensor:
    """A group's attention as one mask, bool (columns, columns): true where a query may attend to a key."""
    columns = span.end - span.start
    sequence = torch.zeros(columns, dtype=torch.long)  # 0: the prompt
    for number, (start, length) in enumerate(zip(span.branch_starts(), span.branches, strict=True), start=1):
        sequence[start - span.start : start - span.start + length] = number
    causal = torch.ones(columns, columns, dtype=torch.bool).tril()
    return causal & ((sequence[:, None] == sequence) | (sequence == 0))


def _runs(span: Span) -> Iterator[Run]:
    yield Run(span.start, 1, span.prompt)
    at = span.branch_start
    for length, equal in groupby(span.branches):
        run = Run(at, len(list(equal)), length)
        at = run.end
        if length:
            yield run
