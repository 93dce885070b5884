"""The noise is Gumbel, the draws are the softmax's, and nothing but seed and position decides them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from capipe.models.engines.sampling import apply, fold_seed, gumbel_noise

ROWS = 4000


def uniform(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """The noise taken back to [0, 1] through its distribution function."""
    return torch.exp(-torch.exp(-gumbel_noise(seeds, positions, vocab, "cpu").double()))


def draw(logits: Tensor, draws: int, temperature: float = 1.0, top_p: float | None = None, seed: int = 5) -> Tensor:
    """``draws`` tokens from the same logits, at successive positions of one seed."""
    return apply(
        logits.expand(draws, -1),
        torch.full((draws,), seed),
        torch.arange(draws),
        torch.full((draws,), temperature),
        None if top_p is None else torch.full((draws,), top_p),
    ).argmax(dim=-1)


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [
        (torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.long)),
        (torch.full((ROWS,), 3), torch.arange(ROWS)),
        (torch.arange(ROWS) << 32, torch.zeros(ROWS, dtype=torch.long)),
        (-torch.arange(ROWS), torch.arange(ROWS)),
    ],
    ids=["successive seeds", "successive positions", "seeds alike in their low bits", "negative seeds"],
)
def test_noise_is_uniform_and_independent(seeds: Tensor, positions: Tensor) -> None:
    values = uniform(seeds, positions, 250)
    counts = torch.histc(values.flatten().float(), bins=64, min=0, max=1)
    expected = values.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * math.sqrt(2 * 63)  # chi squared, 5 sigma
    centred = (values - 0.5) * math.sqrt(12)
    limit = 5 / math.sqrt(values.numel())
    for lag in (1, 2, 7):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < limit  # between rows
        assert abs(float((centred[:, lag:] * centred[:, :-lag]).mean())) < limit  # between tokens


def test_noise_is_finite_with_the_moments_of_a_gumbel() -> None:
    noise = gumbel_noise(torch.arange(64), torch.arange(64), 152_000, "cpu")
    assert bool(torch.isfinite(noise).all())
    assert float(noise.double().mean()) == pytest.approx(0.57722, abs=0.003)
    assert float(noise.double().var()) == pytest.approx(math.pi**2 / 6, rel=0.01)
    assert float(noise.max()) > 13  # the largest of ten million should be near 16: the tail is not cut


def test_frequencies_match_the_softmax() -> None:
    logits, draws = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2, 60_000
    for temperature in (0.7, 1.0, 1.6):
        wanted = (logits / temperature).softmax(dim=-1)
        seen = draw(logits, draws, temperature).bincount(minlength=40) / draws
        slack = 5 * torch.sqrt(wanted * (1 - wanted) / draws)
        assert bool(((seen - wanted).abs() <= slack + 1e-6).all())


def test_top_p_cuts_the_tail_and_renormalises() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])
    seen = draw(probabilities.log(), 30_000, top_p=0.8).bincount(minlength=5) / 30_000
    torch.testing.assert_close(seen, torch.tensor([0.0, 0.4, 0.25, 0.2, 0.0]) / 0.85, atol=0.015, rtol=0)


def test_top_p_keeps_the_likeliest_token_and_one_is_full_support() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -18.0])
    assert draw(logits, 500, top_p=1e-6).unique().tolist() == [0]
    drawn = apply(logits[None], *(torch.tensor([1]),) * 2, torch.tensor([1.0]), torch.tensor([1.0]))
    assert bool(torch.isfinite(drawn).all())


def test_draws_do_not_depend_on_the_batch() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(2))
    seeds, positions = torch.tensor([1, 2, 3, 1, 2, 3]), torch.tensor([0, 5, 9, 1, 0, 0])
    temperatures = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.3])
    top_ps = torch.tensor([1.0, 1.0, 0.9, 1.0, 0.5, 1.0])
    together = apply(logits, seeds, positions, temperatures, top_ps)
    for row in range(6):
        one = slice(row, row + 1)
        cut = top_ps[one] if top_ps[row] < 1 else None
        alone = apply(logits[one], seeds[one], positions[one], temperatures[one], cut)
        assert torch.equal(alone[0], together[row])
    assert torch.equal(together[1], logits[1])  # greedy: untouched


def test_the_draw_is_pinned() -> None:
    """Datasets were made with these draws: a change here changes what every seed means."""
    noise = gumbel_noise(torch.tensor([0, 1, -7]), torch.tensor([0, 0, 41]), 4, "cpu")
    torch.testing.assert_close(noise, torch.tensor(PINNED), atol=1e-6, rtol=0)


def test_seeds_fold_into_64_bits() -> None:
    assert fold_seed(5) == 5
    assert fold_seed(-1) == -1
    assert fold_seed((1 << 64) - 1) == -1
    assert fold_seed((1 << 64) + 9) == 9
    assert fold_seed(1 << 63) == -(1 << 63)


PINNED = [
    [1.997111, -0.4911367, 2.71579, 1.085007],
    [2.111724, 0.765919, 0.3633415, -0.3298398],
    [0.8938037, -0.1445846, 2.359793, 2.68839],
]
