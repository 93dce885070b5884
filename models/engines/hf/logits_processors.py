"""Rules for a batch's next tokens: repetition penalty, no repeated n-grams, a least length.

Each as transformers' processor of that name, in transformers' order, over the prompt and what was generated (of
encoder-decoders: over the decoder's own prompt); rows may have different ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import Sampling
from ..sampling import NO_TOKEN, penalise_


class LogitsProcessors:
    """Applies each row's rules. Rows may leave, repeat or change places, but not join.

    ``prompts``: each row's ids ``(length,)``; ``ends``: ids that end a text.
    """

    def __init__(
        self, samplings: Sequence[Sampling], prompts: Sequence[Tensor], ends: Sequence[int], device: torch.device
    ) -> None:
        self._penalties = torch.tensor([sampling.repetition_penalty for sampling in samplings], device=device)
        self._sizes = torch.tensor([sampling.no_repeat_ngram for sampling in samplings], device=device)
        self._least = torch.tensor([sampling.min_tokens for sampling in samplings], device=device)
        self._longest_minimum = max((sampling.min_tokens for sampling in samplings), default=0)
        self._ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self._penalised = any(sampling.repetition_penalty != 1 for sampling in samplings)
        self._ngrams = sorted({sampling.no_repeat_ngram for sampling in samplings} - {0})
        self._reads = self._penalised or bool(self._ngrams)
        self._history = padded_left(prompts, device) if self._reads else None  # (rows, tokens)

    def __call__(self, logits: Tensor, position: int) -> Tensor:
        """Logits or log-probabilities ``(rows, vocab)`` after ``position`` generated tokens; the input is kept."""
        if self._history is None and position >= self._longest_minimum:
            return logits
        logits = logits.clone()
        if self._history is not None and self._penalised:
            penalise_(logits, self._history, self._penalties)
        for size in self._ngrams:
            assert self._history is not None
            ban_ngrams_(logits, self._history, size, self._sizes == size)
        if position < self._longest_minimum:
            too_short = (self._least > position)[:, None]
            ends = logits.index_select(1, self._ends).masked_fill_(too_short, -math.inf)
            logits.index_copy_(1, self._ends, ends)
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (rows,) of indices, in this order; indices may repeat."""
        self._penalties, self._sizes, self._least = self._penalties[rows], self._sizes[rows], self._least[rows]
        if self._history is not None:
            self._history = self._history[rows]

    def append(self, tokens: Tensor) -> None:
        """Each row's newest token, ``(rows,)``."""
        if self._history is not None:
            self._history = torch.cat([self._history, tokens[:, None]], dim=1)


def padded_left(prompts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Ids of prompts as ``(rows, longest)``, with NO_TOKEN before the shorter ones."""
    longest = max(len(prompt) for prompt in prompts)
    rows = torch.full((len(prompts), longest), NO_TOKEN, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    return rows.to(device)


def ban_ngrams_(logits: Tensor, history: Tensor, size: int, rows: Tensor) -> None:
    """-inf for tokens that would complete an n-gram of ``size`` that a row's history has already; in place.

    ``rows``: (rows,), true where the rule holds.
    """
    windows = history.shape[1] - size + 1
    if windows < 1:
        return
    beginning, ending = history[:, history.shape[1] - size + 1 :], history[:, size - 1 :]  # the newest; of each window
    matches = rows[:, None] & (beginning != NO_TOKEN).all(dim=1)[:, None] & (ending != NO_TOKEN)
    for place in range(size - 1):
        matches &= history[:, place : place + windows] == beginning[:, place : place + 1]
    row, window = matches.nonzero(as_tuple=True)
    logits[row, ending[row, window]] = -math.inf
