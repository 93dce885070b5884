"""Each loss against its closed form, written out by hand for a few tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from capipe.trainer.losses import LOSSES, ClipRange, Tokens, Totals, kl_tokens, token_weights, value_losses

OLD = torch.tensor([-1.0, -2.0, -0.5, -1.5, -3.0])
LOGP = torch.tensor([-0.5, -2.1, -0.5, -2.5, -2.9])  # ratios e^0.5, e^-0.1, 1, e^-1, e^0.1
ROW = torch.tensor([0, 0, 0, 1, 1])
LENGTHS = torch.tensor([3, 2])
ADVANTAGES = torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0])
CLIP = ClipRange(0.2, 0.28, cap=1.5)
TOTALS = Totals(rows=2, tokens=5, limit=10)


def total(name: str, logp: Tensor = LOGP, advantages: Tensor = ADVANTAGES) -> Tensor:
    loss = LOSSES[name]
    values = loss.of_token(Tokens(logp, OLD, advantages, ROW, 2), CLIP)
    return (values * token_weights(ROW, LENGTHS, loss.aggregation, TOTALS)).sum()


# The first token's ratio is above the clip, so 1.28 A counts; the fourth's is below and A negative, so 0.8 A counts.
CLIPPED = [-1.28, -math.exp(-0.1), -1.0, 1.6, 2 * math.exp(0.1)]
FIRST, SECOND = math.exp((0.5 - 0.1 + 0) / 3), math.exp((-1 + 0.1) / 2)
EXPECTED: dict[str, float] = {
    "grpo": (sum(CLIPPED[:3]) / 3 + sum(CLIPPED[3:]) / 2) / 2,
    "dr_grpo": sum(CLIPPED) / 20,
    "dapo": sum(CLIPPED) / 5,
    "ppo": sum(CLIPPED) / 5,
    "gspo": (-FIRST + 2 * max(SECOND, 0.8)) / 2,
    "cispo": (1.5 * 0.5 + math.exp(-0.1) * 2.1 + 0.5 - 2 * math.exp(-1) * 2.5 - 2 * math.exp(0.1) * 2.9) / 5,
    **dict.fromkeys(("a2c", "best_of_n", "sft"), (0.5 + 2.1 + 0.5 - 2 * 2.5 - 2 * 2.9) / 5),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_each_loss_is_its_closed_form(name: str) -> None:
    assert total(name).item() == pytest.approx(EXPECTED[name], abs=1e-6)


# The gradient is -A times these, and a token's weight; 0 where the ratio is held.
RATIOS = [math.exp(0.5), math.exp(-0.1), 1.0, math.exp(-1), math.exp(0.1)]
HELD = [0.0, *RATIOS[1:3], 0.0, RATIOS[4]]
SLOPES: dict[str, tuple[list[float], list[float]]] = {  # with the advantages, and with their signs turned
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "ppo"), (HELD, RATIOS)),
    "gspo": ([FIRST] * 3 + [0.0] * 2, [FIRST] * 3 + [SECOND] * 2),
    "cispo": ([1.5, *RATIOS[1:]], [1.5, *RATIOS[1:]]),
    **dict.fromkeys(("a2c", "best_of_n", "sft"), ([1.0] * 5, [1.0] * 5)),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", list(LOSSES))
def test_each_gradient_is_its_closed_form(name: str, turned: bool) -> None:
    """What would take the policy back to where it was is never held: a rare token punished, a likely one rewarded."""
    logp = LOGP.clone().requires_grad_()
    advantages = -ADVANTAGES if turned else ADVANTAGES
    total(name, logp, advantages).backward()
    weights = token_weights(ROW, LENGTHS, LOSSES[name].aggregation, TOTALS)
    assert logp.grad is not None
    assert torch.allclose(logp.grad, -advantages * torch.tensor(SLOPES[name][turned]) * weights, atol=1e-6)


@pytest.mark.parametrize("name", list(LOSSES))
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    """Where the sampling policy is the policy itself, all of them follow -A times the gradient of log p."""
    logp = OLD.clone().requires_grad_()
    total(name, logp).backward()
    weights = token_weights(ROW, LENGTHS, LOSSES[name].aggregation, TOTALS)
    assert logp.grad is not None
    assert torch.allclose(logp.grad, -ADVANTAGES * weights, atol=1e-6)


def test_the_sequence_ratio_moves_with_each_of_its_tokens() -> None:
    logp = OLD.clone().requires_grad_()
    loss = LOSSES["gspo"].of_token(Tokens(logp, OLD, ADVANTAGES, ROW, 2), CLIP)
    loss[0].backward()  # one token's value
    assert logp.grad is not None and logp.grad[:3].tolist() == pytest.approx([-1 / 3] * 3)
    assert logp.grad[3:].tolist() == [0, 0]


def test_weights_add_up_and_micro_batches_are_sums() -> None:
    for how in ("sequence", "token"):
        assert token_weights(ROW, LENGTHS, how, TOTALS).sum().item() == pytest.approx(1)  # type: ignore[arg-type]
    assert token_weights(ROW, LENGTHS, "constant", TOTALS).sum().item() == pytest.approx(5 / 20)
    first = token_weights(torch.zeros(3, dtype=torch.long), LENGTHS[:1], "sequence", TOTALS)
    assert first.tolist() == token_weights(ROW, LENGTHS, "sequence", TOTALS)[:3].tolist()


def test_divergence_estimates() -> None:
    """Under the policy's own distribution k1 and k3 average to the divergence itself, k3 is never negative."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        assert (p * kl_tokens(p.log(), q.log(), estimator)).sum() == pytest.approx(exact.item())  # type: ignore[arg-type]
    assert kl_tokens(p.log(), q.log(), "k2").tolist() == pytest.approx(((p / q).log() ** 2 / 2).tolist())
    assert (kl_tokens(p.log(), q.log(), "k3") >= 0).all() and kl_tokens(p.log(), q.log(), "k1").min() < 0
    assert kl_tokens(p.log(), p.log(), "k3").abs().max() == 0


def test_what_a_divergence_pulls_towards() -> None:
    """On-policy, averaged: k2 has the gradient of the divergence, k3 of that the other way round, k1 none."""
    scores = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    logp, q = scores.log_softmax(0), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def slope(value: Tensor) -> list[float]:
        return torch.autograd.grad(value, scores, retain_graph=True)[0].tolist()

    found = {each: slope((logp.exp().detach() * kl_tokens(logp, q.log(), each)).sum()) for each in ("k1", "k2", "k3")}
    assert found["k1"] == pytest.approx([0, 0, 0], abs=1e-12)
    assert found["k2"] == pytest.approx(slope((logp.exp() * (logp - q.log())).sum()))
    assert found["k3"] == pytest.approx(slope((q * (q.log() - logp)).sum()))


def test_value_loss_takes_the_larger_error_where_it_is_held() -> None:
    values, old, returns = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0])
    assert value_losses(values, old, returns, None).tolist() == [0.0, 2.0]
    assert value_losses(values, old, returns, 0.2).tolist() == pytest.approx([0.32, 2.0])  # held at 1.2
