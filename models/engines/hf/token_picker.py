"""The next token of each row of a batch, with noise where a row samples, and its log-probability."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..base import Sampling
from ..sampling import apply, fold_seed, gumbel_noise, kernel_runs_on, scaled, with_noise

NOISE_VALUES, MOST_AHEAD = 1 << 16, 16  # noise computed at once: few calls for a small model, within a core's cache


class TokenPicker:
    """The next token of each row: the argmax, after adding noise where a row samples. Rows may leave, but not join."""

    def __init__(self, samplings: list[Sampling], device: torch.device) -> None:
        self._greedy = all(sampling.temperature == 0 for sampling in samplings)
        self._cut = any(sampling.top_p < 1 for sampling in samplings)
        self._seeds = torch.tensor([fold_seed(sampling.seed) for sampling in samplings], device=device)
        self._temperatures = torch.tensor([sampling.temperature for sampling in samplings], device=device)
        self._top_ps = torch.tensor([sampling.top_p for sampling in samplings], device=device)
        self._rows: list[int] = []
        self._at = torch.zeros(0, dtype=torch.long)
        self._first = 0
        self._noise = torch.zeros(0)  # (tokens ahead, rows, vocab), from token ``_first`` on

    def pick(self, logits: Tensor, rows: list[int], position: int) -> Tensor:
        """Tokens ``(rows,)`` from ``logits`` ``(rows, vocab)``; all rows have sampled ``position`` tokens so far."""
        if self._greedy:
            return logits.argmax(dim=-1)
        if rows != self._rows:
            self._keep(rows)
        temperatures = self._temperatures[self._at]
        top_ps = self._top_ps[self._at] if self._cut else None
        if kernel_runs_on(logits.device):  # the kernel computes noise while adding it: no need to look ahead
            positions = torch.full_like(self._at, position)
            return apply(logits, self._seeds[self._at], positions, temperatures, top_ps).argmax(dim=-1)
        if not self._first <= position < self._first + len(self._noise):
            self._look_ahead(position, logits.shape[-1])
        return with_noise(logits, self._noise[position - self._first], temperatures, top_ps).argmax(dim=-1)

    def _keep(self, rows: list[int]) -> None:
        if len(self._noise):
            places = {row: index for index, row in enumerate(self._rows)}
            self._noise = self._noise[:, [places[row] for row in rows]]
        self._rows, self._at = list(rows), torch.tensor(rows, device=self._seeds.device)

    def _look_ahead(self, position: int, vocab_size: int) -> None:
        """Precompute the noise of the rows' next tokens: it does not depend on what is sampled."""
        rows, device = len(self._rows), self._seeds.device
        ahead = min(max(1, NOISE_VALUES // (rows * vocab_size)), MOST_AHEAD)
        places = torch.arange(position, position + ahead, device=device).repeat_interleave(rows)
        noise = gumbel_noise(self._seeds[self._at].repeat(ahead), places, vocab_size, device)
        self._first, self._noise = position, noise.unflatten(0, (ahead, rows))


class ReferenceNoise(LogitsProcessor):
    """The same noise, for transformers' own generation loop."""

    def __init__(self, prompt_length: int, sampling: Sampling) -> None:
        self._prompt_length = prompt_length
        self._sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sampling, device = self._sampling, scores.device
        position = torch.tensor([input_ids.shape[1] - self._prompt_length], device=device)
        seed = torch.tensor([fold_seed(sampling.seed)], device=device)
        temperature = torch.tensor([sampling.temperature], device=device)
        return apply(scores, seed, position, temperature, torch.tensor([sampling.top_p], device=device))


def tempered_logits(logits: Tensor, samplings: Sequence[Sampling | None]) -> Tensor:
    """``logits`` as they were sampled from, for rows that report log-probabilities of that; None for the others."""
    if all(sampling is None or _is_plain(sampling) for sampling in samplings):
        return logits
    chosen = [sampling or Sampling() for sampling in samplings]
    temperatures = torch.tensor([sampling.temperature for sampling in chosen], device=logits.device)
    top_ps = torch.tensor([sampling.top_p for sampling in chosen], device=logits.device)
    return scaled(logits, temperatures, top_ps if bool((top_ps < 1).any()) else None)


def _is_plain(sampling: Sampling) -> bool:
    return sampling.temperature in (0, 1) and sampling.top_p == 1


def token_logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    """Log-probability of each row's token, from the logits as they are."""
    scores: list[float] = logits.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0].tolist()
    return scores
