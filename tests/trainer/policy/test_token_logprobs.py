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
