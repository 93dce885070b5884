"""What an update reports, and takes into account, about sampling and about the distance from the start."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from capipe.models.engines.base import Completion
from capipe.trainer.log import Clock, progress_line
from capipe.trainer.losses import Correction, CorrectionMode
from capipe.trainer.policy.batch import Group, pack
from capipe.trainer.policy.critic import token_rewards
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.update import UpdateConfig, scores_of

from .test_update import SCORES, after, make, scored

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


def test_where_nothing_was_kept_the_distance_is_unknown_at_another_temperature_it_is_not() -> None:
    policy, updater = make()
    assert updater.update(scored(policy, SCORES)).mismatch is None
    policy.temperature = 0.7  # engines report the distribution that they sample from, or nothing
    assert updater.update(drawn_apart(policy, 0.25)).mismatch == pytest.approx(0.25, rel=1e-4)


# --- a correction for whoever sampled ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("steps", [1, 2])
def test_what_a_correction_cut_is_counted(mode: CorrectionMode, steps: int) -> None:
    """Completions of 7 (nothing kept), 3 and 1 tokens, then 2 and 5, by turns 0.5 below and above the policy."""
    policy, updater = make(UpdateConfig(correction=Correction(mode, 1.5), epochs=steps, max_norm=1e9, budget=1))
    made = drawn_apart(policy, 0.5)
    with pytest.raises(ValueError, match="were sampled with"):
        updater.update(made)
    first = made[0].completions[0]
    logp = tuple(policy(pack(made[:1])).logp[:7].tolist())  # of the policy itself: weight 1
    made[0].completions[0] = Completion(first.text, first.token_ids, "stop", first.n_tokens, logp)
    report = updater.update(made)
    ratios = [1.0] * 7, [math.exp(-0.5)] * 3, [math.exp(0.5)], [math.exp(0.5)] * 2, [math.exp(-0.5)] * 5
    if mode.startswith("sequence"):
        ratios = tuple([math.prod(row)] * len(row) for row in ratios)
    weights = [weight for row in ratios for weight in row]
    cut = [0.0 if mode.endswith("mask") else 1.5 if weight > 1.5 else weight for weight in weights]
    kept = [weight if weight <= 1.5 else end for weight, end in zip(weights, cut, strict=True)]
    assert report.capped == (2 if mode.startswith("sequence") else 3)
    assert report.correction == pytest.approx(sum(kept) / 18, rel=1e-4)
    assert report.mismatch == pytest.approx(0.5 * 11 / 18, rel=1e-4)
    assert steps > 1 or report.ratio_min == report.ratio_max == 1.0  # ratios are against the policy before the update


def test_without_a_correction_nothing_is_counted() -> None:
    policy, updater = make()
    report = updater.update(drawn_apart(policy, 0.5))
    assert report.capped is None and report.correction is None


# --- the divergence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [{"kl": 1e-6, "estimator": "k2"}, {"kl": 1e-6, "kl_in": "reward"}])
def test_the_divergence_that_is_reported_is_k3(where: dict[str, Any]) -> None:
    policy, updater = make(UpdateConfig(max_norm=1e9, **where), reference=lambda batch: policy(batch).logp.detach() - 2)
    report = updater.update(scored(policy, [[1.0, 0.0, 0.5]]))
    assert report.kl == pytest.approx(math.exp(-2) - 1 + 2, rel=1e-4)


def test_what_was_not_measured_is_none_not_zero() -> None:
    policy, updater = make()
    report = updater.update(scored(policy, SCORES))
    assert (report.kl, report.value_loss) == (None, None) and report.entropy is not None and report.entropy > 0
    report = updater.update(scored(policy, [[0.5, 0.5, 0.5]]))  # tied: nothing is computed
    assert (report.kl, report.value_loss, report.entropy) == (None, None, None)
    figures = {**dataclasses.asdict(report), "captions": 3, "reward": 0.5, "unscored_share": 0, "tokens_per_caption": 4}
    assert "kl" not in (line := progress_line(1, 2, figures, Clock())) and "entropy" not in line
    assert " kl 0 " in progress_line(1, 2, {**figures, "kl": 0.0}, Clock())


def test_a_divergence_beyond_all_numbers_is_reported_and_stops_no_step() -> None:
    """k3 grows as q/p does: a token that the reference finds far likelier is enough; what is learnt is finite."""
    config = UpdateConfig(max_norm=1e9, kl=1e-6, estimator="k2")
    policy, updater = make(config, reference=lambda batch: policy(batch).logp.detach() + 100)
    report = updater.update(scored(policy, [[1.0, 0.0, 0.5]]))
    assert report.kl is not None and math.isinf(report.kl) and report.skipped is None


def test_a_divergence_in_the_reward_is_part_of_the_score_before_the_baseline() -> None:
    """By hand: log p - log q is 0.1, 0.2, ... by token, so captions of 7, 3 and 1 tokens lose 2.8, 2.7 and 1.1 beta."""
    config = UpdateConfig(kl=0.5, kl_in="reward", baseline="group_mean", max_norm=1e9)
    distance = torch.arange(1, 12) / 10
    policy, updater = make(config, reference=lambda batch: policy(batch).logp.detach() - distance)
    made = scored(policy, [[1.0, None, 0.0]])
    updater.update(made)
    assert made[0].advantages.tolist() == pytest.approx([0.5 - 0.425, 0, -0.5 + 0.425], abs=1e-6)
    tied = scored(policy, [[0.5, 0.5, 0.5]])  # scores alike, divergences not
    assert updater.update(tied).skipped is None
    assert tied[0].advantages.tolist() == pytest.approx([2.2 / 2 - 1.4, 2.2 / 2 - 1.35, 2.2 / 2 - 0.55], abs=1e-6)


def test_a_divergence_in_the_reward_stands_at_its_tokens() -> None:
    """By hand: beta 0.5; the score, less the penalty of its third token, goes to the last one; an unscored has none."""
    made = scored(make()[0], [[1.0, 0.5, None]])[0]
    made.rewards[0].per_token = [0, 0, -0.5, 0, 0, 0, 0]
    earned, known = token_rewards(made, scores_of(made, UpdateConfig()), 0.5 * torch.arange(1, 12) / 10)
    by_hand = [-0.05, -0.1, -0.65, -0.2, -0.25, -0.3, 1.5 - 0.35, -0.4, -0.45, 0.5 - 0.5, 0]
    assert earned.tolist() == pytest.approx(by_hand) and known.tolist() == [1] * 10 + [0]


# --- all steps of an update, all groups -------------------------------------------------------------------------------


def test_the_reports_of_all_steps_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a tied group alone is skipped, and said, whether it is the last one or not."""
    scores: list[list[float | None]] = [[1.0, 0.0, 0.5], [None, 0.9], [0.3, 0.3, 0.3]]
    policy, updater = make(UpdateConfig(epochs=2, minibatches=3, max_norm=1e9))
    norms: list[float] = []
    step = updater.step

    def kept(part: Any) -> Any:
        done = step(part)
        norms.append(done.norm)
        return done

    monkeypatch.setattr(updater, "step", kept)
    report = updater.update(scored(policy, scores))
    assert (report.steps, report.steps_skipped) == (6, 4)
    assert report.skipped == "4 of 6 optimizer steps: no group has scores that differ"
    assert (report.groups, report.tied, report.unscored, report.tokens) == (3, 2, 1, 32)
    assert len(norms) == 6 and report.norm == max(norms) and report.ratio_min < 1 < report.ratio_max


def test_an_entropy_bonus_covers_tied_groups() -> None:
    change, report = after([[0.5, 0.5, 0.5]], UpdateConfig(entropy=0.1, max_norm=1e9))
    assert report.skipped is None and report.tied == 1 and change.abs().max() > 0 and report.entropy > 0
    _, both = after(SCORES, UpdateConfig(entropy=0.1, max_norm=1e9))
    policy, _ = make()
    entropies = policy(pack(scored(policy, SCORES))).entropy.detach()  # of all groups, the tied one among them
    assert both.entropy == pytest.approx(float(entropies.mean()), rel=1e-5)
