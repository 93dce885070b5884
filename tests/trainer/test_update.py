"""A step of training: what teaches nothing costs nothing, what is not finite changes nothing, good gets likelier."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from capipe.models.engines.base import Completion
from capipe.trainer.losses import LOSSES
from capipe.trainer.policy.batch import Group, RewardResult, pack
from capipe.trainer.policy.critic import CriticConfig, ValueHead, token_rewards
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.update import UpdateConfig, UpdateMetrics, Updater, scores_of

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


@pytest.mark.parametrize("loss", list(LOSSES))
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
    policy, updater = make(UpdateConfig(minibatches=2, max_norm=1e9, kl=1e-9), reference=lambda batch: torch.zeros(1))
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


# --- how far the sampler is from the policy ---------------------------------------------------------------------------


def drawn_apart(policy: DecoderPolicy, gap: float) -> list[Group]:
    """Groups whose captions another sampler drew, ``gap`` away from the policy; of the first, one kept nothing."""
    made = scored(policy, SCORES[:2])
    for group in made:
        rows = policy(pack([group])).logp.detach().split([each.n_tokens for each in group.completions])
        signs = [1 if number % 2 else -1 for number in range(len(rows))]
        group.completions = [
            Completion(each.text, each.token_ids, "stop", each.n_tokens, tuple((row + sign * gap).tolist()))
            for each, row, sign in zip(group.completions, rows, signs, strict=True)
        ]
    first = made[0].completions[0]
    made[0].completions[0] = Completion(first.text, first.token_ids, "stop", first.n_tokens)
    return made


@pytest.mark.parametrize("config", [UpdateConfig(budget=1), UpdateConfig(epochs=2)])
def test_the_distance_from_the_sampler_is_of_the_policy_before_it_changed(config: UpdateConfig) -> None:
    policy, updater = make(config)
    report = updater.update(drawn_apart(policy, 0.25))
    assert report.skipped is None and report.mismatch == pytest.approx(0.25, rel=1e-4)


def test_where_nothing_was_kept_or_kept_at_another_temperature_the_distance_is_unknown() -> None:
    policy, updater = make()
    assert updater.update(scored(policy, SCORES)).mismatch is None
    policy.temperature = 0.7
    assert updater.update(drawn_apart(policy, 0.25)).mismatch is None
