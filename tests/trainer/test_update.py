"""A step of training: what teaches nothing costs nothing, what is not finite changes nothing, good gets likelier."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from capipe.models.engines.base import Completion
from capipe.trainer.losses import LOSSES
from capipe.trainer.metrics import UpdateMetrics
from capipe.trainer.policy.batch import Group, RewardResult, pack
from capipe.trainer.policy.critic import CriticConfig, ValueHead, token_rewards
from capipe.trainer.policy.decoder import DecoderPolicy, reference_logps
from capipe.trainer.update import UpdateConfig, Updater, scores_of

from .policies import IMAGE, groups, random_model

FAMILY = "qwen2.5"


def scored(policy: DecoderPolicy, scores: list[list[float | None]]) -> list[Group]:
    made = groups(policy, FAMILY)[: len(scores)]
    for group, values in zip(made, scores, strict=True):
        group.rewards = [RewardResult(value) for value in values]
    return made


SCORES: list[list[float | None]] = [[1.0, 0.0, 0.5], [0.2, 0.9], [0.3, 0.3, 0.3]]


def make(config: UpdateConfig | None = None, **options: Any) -> tuple[DecoderPolicy, Updater]:
    policy = DecoderPolicy(random_model(FAMILY), [IMAGE])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    return policy, Updater(policy, optimizer, config or UpdateConfig(max_norm=1e9), **options)


def weights(policy: DecoderPolicy) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in policy.parameters()])


def after(scores: list[list[float | None]], config: UpdateConfig | None = None) -> tuple[torch.Tensor, UpdateMetrics]:
    """The change of the weights, and the report."""
    policy, updater = make(config)
    before = weights(policy)
    report = updater.update(scored(policy, scores))
    return weights(policy) - before, report


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if loss.captions == "sampled"])
def test_better_captions_get_likelier(loss: str) -> None:
    policy, updater = make(UpdateConfig(loss=loss, limit=8))
    made = scored(policy, [[1.0, 0.0, 0.0]])
    before = policy(pack(made)).logp.detach()
    report = updater.update(made)
    change = policy(pack(made)).logp.detach() - before
    first = made[0].completions[0].n_tokens
    assert change[:first].mean() > 0 > change[first:].mean()
    assert report.ratio_min == report.ratio_max == 1.0 and report.skipped is None  # no pass for old log-probabilities


def test_a_tied_group_costs_nothing_but_counts_in_the_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, updater = make()
    seen: list[int] = []
    forward = policy.forward
    monkeypatch.setattr(policy, "forward", lambda batch: seen.append(len(batch.lengths)) or forward(batch))  # type: ignore[func-returns-value]
    before = weights(policy)
    report = updater.update(scored(policy, SCORES))
    assert sum(seen) == 5 and report.tied == 1  # of eight completions, three taught nothing
    skipping = weights(policy) - before

    other, updater = make()
    made = scored(other, SCORES)
    before = weights(other)
    whole = LOSSES["grpo"]
    updater.config = UpdateConfig(max_norm=1e9, kl=1e-12)  # a KL term brings them back in
    updater._reference = lambda batch: other(batch).logp.detach()
    updater.update(made)
    assert whole.aggregation == "sequence"
    assert torch.allclose(weights(other) - before, skipping, atol=1e-9)


def test_an_unscored_caption_has_no_part() -> None:
    with_none, report = after([[1.0, 0.0, None]])
    assert report.unscored == 1 and with_none.abs().max() > 0
    policy, updater = make()
    made = scored(policy, [[1.0, 0.0, None]])
    updater.update(made)
    assert made[0].advantages[2] == 0


@pytest.mark.parametrize("scores", [[[0.5, 0.5, 0.5]], [[None, None, None]], [[None, 1.0, None]]])
def test_a_step_that_teaches_nothing_changes_nothing(scores: list[list[float | None]]) -> None:
    change, report = after(scores)
    assert report.skipped == "no group has scores that differ" and change.abs().max() == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float) -> None:
    policy, updater = make()
    made = scored(policy, SCORES)
    weight = policy.model.lm_head.weight
    with torch.no_grad():
        kept = weight[0, 0].item()
        weight[0, 0] = poison
    before = weights(policy)
    report = updater.update(made)
    assert report.skipped is not None and "not finite" in report.skipped
    after_step = weights(policy)
    assert torch.equal(before.isfinite(), after_step.isfinite())
    assert torch.equal(before[before.isfinite()], after_step[before.isfinite()])
    with torch.no_grad():
        weight[0, 0] = kept
    assert updater.update(made).skipped is None  # and the next step is as if nothing had been


def test_the_budget_changes_nothing() -> None:
    whole, _ = after(SCORES, UpdateConfig(budget=10_000, max_norm=1e9))
    parts, _ = after(SCORES, UpdateConfig(budget=1, max_norm=1e9))
    assert torch.allclose(whole, parts, atol=1e-9) and whole.abs().max() > 0


def test_cut_captions_may_be_masked() -> None:
    policy, updater = make(UpdateConfig(mask_truncated=True))
    made = scored(policy, [[1.0, 0.0, 0.5]])
    first = made[0].completions[0]
    made[0].completions[0] = type(first)(first.text, first.token_ids, "length", first.n_tokens)
    updater.update(made)
    assert made[0].advantages[0] == 0 and made[0].advantages[1] < 0 < made[0].advantages[2]


def test_divergence_holds_the_policy_back() -> None:
    torch.manual_seed(1)
    frozen = DecoderPolicy(random_model(FAMILY, seed=5).requires_grad_(False), [IMAGE])
    config = UpdateConfig(kl=1.0, max_norm=1e9, estimator="k2")
    policy, updater = make(config, reference=lambda batch: frozen(batch).logp)
    made = scored(policy, [[0.5, 0.5, 0.5]])  # nothing but the divergence to learn from
    divergences = [updater.update(made).kl for _ in range(4)]
    assert divergences[-1] < divergences[0] / 2
    with pytest.raises(ValueError, match="reference"):
        make(config)


# --- imitation: of the best captions, of given ones -------------------------------------------------------------------


def change_by_hand(rows: list[tuple[int, int]], weight_of: float) -> torch.Tensor:
    """A plain SGD step on ``weight_of`` times the summed negative log-likelihood of completions (group, number)."""
    policy = DecoderPolicy(random_model(FAMILY), [IMAGE])
    before, made = weights(policy), groups(policy, FAMILY)
    for group, number in rows:
        tokens = made[group].completions[number].token_ids
        (-reference_logps(policy, made[group].prompt, tokens).sum() * weight_of).backward()
    torch.optim.SGD(policy.parameters(), lr=0.01).step()
    return weights(policy) - before


@pytest.mark.parametrize("config", [{}, {"minibatches": 1, "epochs": 1, "budget": 1}])
def test_the_best_caption_of_each_group_is_imitated(config: dict[str, Any]) -> None:
    """The likelihood's gradient by another way, a caption at a time; a tied group has no best one."""
    scores: list[list[float | None]] = [[0.1, 0.5, 0.5], [0.2, 0.9], [0.3, 0.3, 0.3], [None]]
    change, report = after(scores, UpdateConfig(loss="best_of_n", max_norm=1e9, **config))
    by_hand = change_by_hand([(0, 1), (1, 1)], 1 / (3 + 5))  # the first of equals; a mean over their tokens
    assert torch.allclose(change, by_hand, atol=1e-7) and by_hand.abs().max() > 1e-3
    assert (report.tokens, report.tied, report.unscored, report.skipped) == (8, 2, 1, None)


def test_given_captions_are_imitated_without_scores() -> None:
    policy, updater = make(UpdateConfig(loss="sft", max_norm=1e9))
    before, made = weights(policy), groups(policy, FAMILY)[:2]
    report = updater.update(made)
    rows = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert torch.allclose(weights(policy) - before, change_by_hand(rows, 1 / 18), atol=1e-7)
    assert (report.tokens, report.tied, report.unscored, report.mismatch) == (18, 0, 0, None)


@pytest.mark.parametrize("loss", ["best_of_n", "sft"])
def test_imitation_in_several_steps_gets_there(loss: str) -> None:
    policy, updater = make(UpdateConfig(loss=loss, epochs=2, minibatches=2, max_norm=1e9))
    made = scored(policy, [[1.0, 0.0, 0.0], [0.0, 1.0]]) if loss == "best_of_n" else groups(policy, FAMILY)[:2]
    losses = [updater.update(made).loss for _ in range(4)]
    assert losses[-1] < losses[0] and not updater.incomplete


def test_an_update_that_breaks_off_after_a_step_is_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    _, updater = make(UpdateConfig(minibatches=2, max_norm=1e9))
    made = scored(updater.policy, SCORES[:2])
    steps = iter([updater.optimizer.step, None])
    monkeypatch.setattr(updater.optimizer, "step", lambda: next(steps)())  # type: ignore[misc]
    with pytest.raises(TypeError):
        updater.update(made)
    assert updater.incomplete
    monkeypatch.undo()
    monkeypatch.setattr(updater, "_losses", None)
    updater.incomplete = False
    with pytest.raises(TypeError):
        updater.update(made)
    assert not updater.incomplete  # nothing had changed


# --- several steps, older captions, value heads -----------------------------------------------------------------------


def with_critic(config: UpdateConfig, **options: Any) -> tuple[DecoderPolicy, Updater]:
    policy = DecoderPolicy(random_model(FAMILY), [IMAGE], value_head=ValueHead(32).double())
    return policy, Updater(policy, torch.optim.SGD(policy.parameters(), lr=0.02), config, **options)


@pytest.mark.parametrize(("loss", "whiten"), [("ppo", True), ("a2c", False)])
def test_a_value_head_learns_what_captions_earn(loss: str, whiten: bool) -> None:
    config = UpdateConfig(loss=loss, critic=CriticConfig(lam=1.0, whiten=whiten, weight=1.0), max_norm=1e9)
    policy, updater = with_critic(config)
    made = scored(policy, [[1.0, 1.0, 1.0], [1.0, 1.0]])
    errors = [updater.update(made).value_loss for _ in range(30)]
    assert errors[0] == pytest.approx(0.5)  # the head begins as 0: half of (0 - 1)²
    assert errors[-1] < 0.1


def test_a_critic_tells_better_from_worse_without_a_group() -> None:
    """One caption per image: a group's baseline would say nothing."""
    config = UpdateConfig(loss="a2c", critic=CriticConfig(whiten=True, detach=True), max_norm=1e9)
    policy, updater = with_critic(config)
    made = scored(policy, [[1.0, 0.0, None], [0.0, 0.0]])
    before = policy(pack(made)).logp.detach()
    report = updater.update(made)
    change = policy(pack(made)).logp.detach() - before
    first = made[0].completions[0].n_tokens
    assert report.skipped is None and change[:first].mean() > 0


def test_a_critic_learns_from_one_caption_an_image() -> None:
    """As VLRM does: nothing is tied, and the better caption gets likelier."""
    config = UpdateConfig(loss="a2c", critic=CriticConfig(lam=1.0, whiten=False, detach=True), max_norm=1e9)
    policy, updater = with_critic(config)
    made = scored(policy, [[1.0], [0.0]])
    for group in made:
        group.completions, group.rewards = group.completions[:1], group.rewards[:1]
    before = policy(pack(made)).logp.detach()
    report = updater.update(made)
    change = policy(pack(made)).logp.detach() - before
    assert (report.tied, report.groups, report.skipped) == (0, 2, None)
    assert change[: made[0].completions[0].n_tokens].mean() > 0


def test_an_unscored_caption_teaches_the_value_head_nothing() -> None:
    config = UpdateConfig(loss="a2c", critic=CriticConfig(whiten=False), max_norm=1e9)
    policy, updater = with_critic(config)
    made = scored(policy, [[None, None, None]])
    before = weights(policy)
    assert updater.update(made).value_loss == 0
    assert torch.equal(weights(policy), before)


def test_rewards_of_tokens_stand_where_they_occur() -> None:
    made = scored(make()[0], [[1.0, 0.5, None]])[0]
    made.rewards[0].per_token = [0, 0, -0.5, 0, 0, 0, 0]
    earned, known = token_rewards(made, scores_of(made, UpdateConfig()))
    assert earned.tolist() == [0, 0, -0.5, 0, 0, 0, 1.5, 0, 0, 0.5, 0]
    assert known.tolist() == [1] * 10 + [0]


def test_several_steps_remember_who_drew_the_captions() -> None:
    _, updater = make(UpdateConfig(epochs=3, max_norm=1e9))
    report = updater.update(scored(updater.policy, SCORES))
    assert report.ratio_min < 1 < report.ratio_max  # the last step's policy is not the one that drew them


def test_minibatches_take_every_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, updater = make(
        UpdateConfig(minibatches=2, max_norm=1e9, kl=1e-9), reference=lambda batch: torch.zeros(len(batch.row))
    )
    seen: list[str] = []
    step = updater.step
    monkeypatch.setattr(updater, "step", lambda part: seen.extend(group.uid for group in part) or step(part))  # type: ignore[func-returns-value]
    updater.update(scored(policy, SCORES))
    assert sorted(seen) == ["a", "b", "c"]


def test_captions_of_older_weights_are_weighed_by_how_they_were_drawn() -> None:
    policy, updater = make(UpdateConfig(loss="cispo", max_norm=1e9))
    made = scored(policy, SCORES)
    with pytest.raises(ValueError, match="sampled with"):
        updater.update(made, off_policy=True)
    for group in made:
        drawn = policy(pack([group])).logp.detach().split([each.n_tokens for each in group.completions])
        group.completions = [
            Completion(each.text, each.token_ids, "stop", each.n_tokens, tuple((row + 0.1).tolist()))
            for each, row in zip(group.completions, drawn, strict=True)
        ]
    report = updater.update(made, off_policy=True)
    assert report.ratio_min == pytest.approx(math.exp(-0.1), rel=1e-5)
