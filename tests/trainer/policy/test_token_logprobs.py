"""Chunked scores equal those from all logits at once, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical

from capipe.trainer.policy.token_logprobs import token_scores

TOKENS, WIDTH, VOCABULARY = 13, 8, 20


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 1 << 20])
def test_chunks_change_nothing(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    logp, entropy = token_scores(hidden, weight, targets, temperature=0.7, chunk_logits=chunk)
    (logp.sum() - 0.1 * entropy.sum()).backward()
    mine = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    whole = Categorical(logits=hidden @ weight.T / 0.7)
    (whole.log_prob(targets).sum() - 0.1 * whole.entropy().sum()).backward()
    assert torch.allclose(logp, whole.log_prob(targets), atol=1e-5)
    assert torch.allclose(entropy, whole.entropy(), atol=1e-5)
    for got, expected in zip(mine, (hidden.grad, weight.grad), strict=True):
        assert got is not None and expected is not None and torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [3 * VOCABULARY, 1 << 20])
def test_a_head_in_bfloat16_is_that_of_rounded_factors_with_float32_sums(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    bias = torch.randn(VOCABULARY, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    logp, entropy = token_scores(hidden, weight, targets, bias=bias, dtype=torch.bfloat16, chunk_logits=chunk)
    assert logp.dtype == entropy.dtype == torch.float32
    (logp.sum() - 0.1 * entropy.sum()).backward()
    exact = [value.detach().bfloat16().double().requires_grad_() for value in (hidden, weight)]
    whole = Categorical(logits=exact[0] @ exact[1].T + bias.detach().double())
    (whole.log_prob(targets).sum() - 0.1 * whole.entropy().sum()).backward()
    assert (logp - whole.log_prob(targets)).abs().max() < 1e-5 and (entropy - whole.entropy()).abs().max() < 1e-5
    for mine, other in zip((hidden, weight), exact, strict=True):
        # The gradient of the logits is rounded, too: eight bits.
        assert mine.grad is not None and mine.grad.dtype == torch.float32 and other.grad is not None
        assert 0 < (mine.grad - other.grad).norm() / other.grad.norm() < 2**-8
    assert bias.grad is not None
    plain = token_scores(hidden, weight, targets, bias=bias)[0]
    assert 1e-4 < (plain - logp).abs().max() < 0.1


def test_a_frozen_head_has_no_gradient_and_may_be_kept_rounded() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    scores = [token_scores(hidden, kept, targets, dtype=torch.bfloat16)[0] for kept in (weight, weight.bfloat16())]
    assert torch.equal(*scores)
    scores[0].sum().backward()
    assert weight.grad is None and hidden.grad is not None


def test_banned_ids_leave_finite_entropies_and_gradients() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH)
    logp, entropy = token_scores(hidden, weight, torch.tensor([0, 1, 2, 3]), banned=torch.tensor([5, 6]))
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all() and entropy.isfinite().all()
    kept = [each for each in range(VOCABULARY) if each not in (5, 6)]
    whole = Categorical(logits=hidden @ weight[kept].T)
    assert torch.allclose(entropy, whole.entropy(), atol=1e-5)
