"""Baselines, combined rewards and returns against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from capipe.trainer.advantages import RewardTerm, advantages, best_only, combine, gae, normalised, tied

NAN = math.nan


def test_baselines() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0])
    assert advantages(rewards, "group_mean").tolist() == [-2, -1, 3]
    assert advantages(rewards, "leave_one_out").tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    assert advantages(rewards, "group_std").tolist() == pytest.approx([x / math.sqrt(7) for x in (-2, -1, 3)], rel=1e-3)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "group_std"])
def test_who_was_not_scored_has_no_part_in_it(baseline: str) -> None:
    whole = advantages(torch.tensor([1.0, 2.0, 6.0]), baseline)  # type: ignore[arg-type]
    holed = advantages(torch.tensor([1.0, NAN, 2.0, 6.0]), baseline)  # type: ignore[arg-type]
    assert holed[[0, 2, 3]].tolist() == whole.tolist() and holed[1] == 0


@pytest.mark.parametrize("rewards", [[0.5, 0.5, 0.5], [0.1 + 0.2, 0.3], [NAN, NAN], [NAN, 1.0], [1.0]])
def test_a_tied_group_says_nothing(rewards: list[float]) -> None:
    assert tied(torch.tensor(rewards))
    assert advantages(torch.tensor(rewards), "group_std").tolist() == [0.0] * len(rewards)


def test_components_are_weighed_and_may_be_normalised_first() -> None:
    quiz, length = torch.tensor([0.0, 1.0, NAN]), torch.tensor([100.0, 300.0, 200.0])
    plain = combine({"quiz": quiz, "length": length}, {"quiz": RewardTerm(1.0), "length": RewardTerm(0.01)})
    assert plain[:2].tolist() == [1.0, 4.0] and plain[2].isnan()
    both = combine({"quiz": quiz, "length": length}, {"quiz": RewardTerm(1, True), "length": RewardTerm(0.5, True)})
    root = math.sqrt(0.5)
    assert both[:2].tolist() == pytest.approx([-root - 0.5, root + 0.5], rel=1e-3) and both[2].isnan()
    assert normalised(torch.tensor([3.0, 3.0, NAN]))[:2].tolist() == [0, 0]
    with pytest.raises(ValueError, match="no reward"):
        combine({}, {})


def test_generalised_advantages() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 0.4, 0.3], [1.0, 7.0, 7.0]])
    found, returns = gae(rewards, values, torch.tensor([3, 1]), 1.0, 0.5)
    third = 1 - 0.3
    second = 0.3 - 0.4 + 0.5 * third
    first = 0.4 - 0.5 + 0.5 * second
    assert found[0].tolist() == pytest.approx([first, second, third])
    assert found[1].tolist() == [1, 0, 0] and returns[1].tolist() == [2, 0, 0]  # nothing from beyond its end
    assert returns[0].tolist() == pytest.approx([first + 0.5, second + 0.4, third + 0.3])


def test_with_lambda_one_returns_are_discounted_sums_whatever_the_values() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    for values in (torch.zeros(1, 3), torch.randn(1, 3)):
        _, returns = gae(rewards, values, torch.tensor([3]), 0.5, 1.0)
        assert returns[0].tolist() == pytest.approx([1 + 1 + 1, 2 + 2, 4], abs=1e-5)


def test_the_best_of_a_group_is_one_caption_or_none() -> None:
    cases = [
        ([0.2, 0.9, 0.9], [0, 1, 0]),  # the first of equals
        ([NAN, 0.1, 0.4], [0, 0, 1]),
        ([-3.0, NAN, -2.0], [0, 0, 1]),
        ([0.5, 0.5, 0.5], [0, 0, 0]),  # none is better than the others
        ([NAN, 0.5, NAN], [0, 0, 0]),  # nothing to compare with
        ([NAN, NAN], [0, 0]),
    ]
    for scores, chosen in cases:
        assert best_only(torch.tensor(scores)).tolist() == chosen
