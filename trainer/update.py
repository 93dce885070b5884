"""Policy update from scored groups: advantages, loss, gradients, optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import RunFailed
from .advantages import Baseline, advantages, best_only, tied
from .distributed import ALONE, Distributed
from .losses import (
    ClipRange,
    Correction,
    KLEstimator,
    Tokens,
    Totals,
    correction_weights,
    find_loss,
    kl_tokens,
    token_weights,
    value_losses,
)
from .metrics import Metrics, OptimizerStep, RatioRange, UpdateMetrics, update_metrics
from .policy.batch import Batch, Group, micro_batches, pack
from .policy.critic import CriticConfig, Targets, joined, moments, targets_of, whitened
from .policy.decoder import DecoderPolicy, Scores
from .sampling.logprobs import SamplingGap, sampled_logps, sampling_metrics

Reference = Callable[[Batch], Tensor]  # log-probabilities (tokens,) under the frozen policy, without gradients


@dataclass(frozen=True)
class UpdateConfig:
    """``limit``: longest completion; ``budget``: packed columns in a micro-batch; ``kl``: beta of the KL term.

    ``kl_in``: a loss of each token by ``estimator``, or a penalty in the reward: beta (log p - log q) of each token
    before GAE, or its sum over a completion before the baseline. ``critic``: advantages from a value head instead of
    ``baseline``. ``correction``: for captions of another engine or older weights. ``epochs`` passes over the groups, of
    ``minibatches`` optimizer steps each.
    """

    loss: str = "grpo"  # a name of LOSSES or an import path
    baseline: Baseline = "group_std"
    critic: CriticConfig | None = None
    clip: ClipRange = field(default_factory=ClipRange)
    kl: float = 0.0
    kl_in: Literal["loss", "reward"] = "loss"
    estimator: KLEstimator = "k3"
    correction: Correction | None = None
    entropy: float = 0.0
    limit: int = 1024
    budget: int = 16384
    max_norm: float = 1.0
    mask_truncated: bool = False
    epochs: int = 1
    minibatches: int = 1

    @property
    def several_steps(self) -> bool:
        return self.epochs * self.minibatches > 1

    @property
    def in_reward(self) -> bool:
        """Whether a KL penalty is part of the reward."""
        return bool(self.kl) and self.kl_in == "reward"


def assign_advantages(groups: Sequence[Group], config: UpdateConfig, penalties: Tensor | None = None) -> None:
    """Set each group's advantages from its rewards; 0 for unscored completions, and for truncated ones if masked.

    ``penalties``: (tokens,), summed over each completion and taken off its score before the baseline.
    For a loss on given captions they are all 1, for one on the best captions 1 for these and 0 for the others.
    """
    captions = find_loss(config.loss).captions
    for group in groups:
        if captions == "given":
            group.advantages = torch.ones(len(group.completions))
            continue
        scores = scores_of(group, config)
        if penalties is not None:
            lengths = [len(completion.token_ids) for completion in group.completions]
            scores = scores - torch.stack([part.sum() for part in penalties.double().cpu().split(lengths)])
        chosen = best_only(scores) if captions == "best" else advantages(scores, config.baseline)
        group.advantages = chosen.float()


def only_best(group: Group) -> Group:
    """A group of those completions that have an advantage: the best one, or none."""
    kept = group.advantages.nonzero()[:, 0].tolist()
    completions, rewards = ([values[index] for index in kept] for values in (group.completions, group.rewards))
    return replace(group, completions=completions, rewards=rewards, advantages=group.advantages[kept])


def is_tied(group: Group, config: UpdateConfig) -> bool:
    """Whether all scores of the group are equal, so that it has no gradient.

    With a critic it has one; given captions have no scores.
    """
    scored = config.critic is None and find_loss(config.loss).captions != "given"
    return scored and tied(scores_of(group, config))


def scores_of(group: Group, config: UpdateConfig) -> Tensor:
    """Scores (completions,), float64; NaN for unscored captions, and for truncated ones if masked."""
    values = [
        float("nan")
        if reward.score is None or (config.mask_truncated and completion.finish_reason == "length")
        else reward.score
        for completion, reward in zip(group.completions, group.rewards, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Losses:
    """A micro-batch's loss ``total`` with its graph; the detached sums of its parts over tokens.

    ``logp``, ``old``: (tokens,), detached.
    """

    total: Tensor
    entropy: Tensor
    kl: Tensor
    value_loss: Tensor
    logp: Tensor
    old: Tensor


class Updater:
    """Updates ``policy`` with ``optimizer``. ``reference``: frozen policy of the KL term, required if ``kl`` is not 0.

    On-policy, with one step per rollout, the sampling policy is the policy itself: its log-probabilities are the
    detached ones of the same forward pass, at no extra cost (the ratio is 1 and its gradient exact). So they are with a
    correction, whose weights are the ratio of these to the sampling distribution's.
    """

    def __init__(
        self,
        policy: DecoderPolicy,
        optimizer: torch.optim.Optimizer,
        config: UpdateConfig,
        reference: Reference | None = None,
        distributed: Distributed = ALONE,
    ) -> None:
        if config.kl and reference is None:
            raise ValueError("a KL term needs the reference policy")
        if config.critic is not None and policy.value_head is None:
            raise ValueError("advantages from a critic need a policy with a value head")
        self.policy, self.optimizer, self.config = policy, optimizer, config
        self._reference, self._distributed = reference, distributed
        self._targets: dict[int, Targets] = {}  # by id() of the group
        self._gaps: list[SamplingGap] = []
        self._off_policy = False  # captions were sampled with older weights
        self._smallest: Group | None = None  # an update's cheapest group to compute
        self._best: dict[int, Group] | None = None  # by id() of the group: only its best caption, for a loss on these
        self.incomplete = False  # an update has changed weights and has not ended

    def update(self, groups: Sequence[Group], off_policy: bool = False) -> UpdateMetrics:
        """All optimizer steps on scored ``groups``.

        ``off_policy``: captions were sampled with older weights, so without a correction their sampling
        log-probabilities are the old ones.
        """
        config = self.config
        assign_advantages(groups, config)
        self._targets, self._gaps, self._off_policy = {}, [], off_policy
        self._best = None
        if find_loss(config.loss).captions == "best":
            self._best = {id(group): only_best(group) for group in groups}
        self._smallest = min((group for group in groups if group.completions), key=Group.tokens, default=None)
        whiten = config.critic is not None and config.critic.whiten
        if config.several_steps or whiten or (config.critic is None and config.in_reward):
            self._fix_targets(self._learned(groups))
        self.policy.train()  # gradient checkpointing and an adapter's dropout are active in training mode only
        try:
            steps = [self.step(minibatch) for minibatch in self._minibatches(groups)]
        finally:
            self.policy.eval()
        self.incomplete = False
        return update_metrics(steps, config.epochs, sampling_metrics(self._gaps).over(self._distributed))

    def step(self, groups: Sequence[Group]) -> OptimizerStep:
        """One optimizer step on ``groups`` with assigned advantages.

        Groups without a gradient are not computed but count in the averages; with a KL term, an entropy bonus or a
        value head every group has one. A non-finite gradient changes nothing and is reported.
        """
        contributing = self._contributing(groups)
        counts = self._counts(groups, contributing).over(self._distributed)
        totals = Totals(int(counts.total("completions")), int(counts.total("tokens")), self.config.limit)
        metrics, ratios = Metrics(("loss", "entropy", "kl", "value_loss")), RatioRange()
        self.optimizer.zero_grad(set_to_none=True)
        with nullcontext() if self._distributed.sharded else self._distributed.agreed():
            for micro_batch, weight in self._micro_batches(contributing):
                losses = self._losses(micro_batch, totals, weight)
                (losses.total * weight * self._distributed.loss_scale).backward()
                self._record(losses, weight, metrics, ratios)
        self._distributed.sum_gradients(self.policy.parameters())
        metrics = metrics.over(self._distributed)
        norm = self._clip_gradients()
        skipped = None
        if not counts.total("contributing"):
            skipped = "no group has scores that differ"
        elif not (math.isfinite(norm) and math.isfinite(metrics.total("loss"))):
            skipped = f"the gradient is not finite (norm {norm})"
        if skipped is None:
            self.incomplete = True
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return OptimizerStep(metrics, counts, ratios, norm, skipped)

    def _minibatches(self, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        """All groups in every epoch, shuffled and split; in their original order if there is only one step."""
        if not self.config.several_steps:
            yield groups
            return
        count = self.config.minibatches
        for epoch in range(self.config.epochs):
            order = Random(f"minibatches:{epoch}").sample(range(len(groups)), len(groups))
            for part in range(count):
                yield [groups[index] for index in order[part::count]]

    def _learned(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with the captions that the loss is computed on, without those that have none."""
        learned = groups if self._best is None else [self._best[id(group)] for group in groups]
        return [group for group in learned if group.completions]

    def _contributing(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with a gradient."""
        config = self.config
        always = bool(config.kl and config.kl_in == "loss") or bool(config.entropy) or config.critic is not None
        return [group for group in self._learned(groups) if always or bool(group.advantages.any())]

    def _counts(self, groups: Sequence[Group], contributing: Sequence[Group]) -> Metrics:
        counts = Metrics(("completions", "tokens", "tied", "unscored", "contributing", "groups"))
        learned = self._learned(groups)
        numbers = {
            "completions": sum(len(group.completions) for group in learned),
            "tokens": sum(group.tokens() for group in learned),
            "tied": sum(is_tied(group, self.config) for group in groups),
            "unscored": sum(reward.score is None for group in groups for reward in group.rewards),
            "contributing": len(contributing),
            "groups": len(groups),
        }
        for name, number in numbers.items():
            counts.add(name, number)
        return counts

    def _micro_batches(self, groups: list[Group]) -> list[tuple[list[Group], float]]:
        """Micro-batches, each with its weight in the step.

        With sharded weights all processes must run equally many passes; one with fewer repeats a group at weight 0.
        """
        batches = [(batch, 1.0) for batch in micro_batches(groups, self.config.budget)]
        if not self._distributed.sharded:
            return batches
        missing = self._distributed.most(len(batches)) - len(batches)
        if missing and self._smallest is None:
            raise RunFailed("none of this process's captions could be sampled, and split weights need some of each")
        return batches + [([self._smallest], 0.0)] * missing if self._smallest else batches

    def _losses(self, groups: list[Group], totals: Totals, weight: float) -> Losses:
        """Loss of a micro-batch: corrected policy loss, plus KL term, plus value loss, minus entropy bonus."""
        config, policy_loss = self.config, find_loss(self.config.loss)
        batch = pack(groups, self.policy.device)
        scores = self.policy(batch)
        targets = self._targets_for(groups, batch, scores, weight)
        tokens = Tokens(scores.logp, targets.old, targets.advantages, batch.row, len(batch.lengths))
        per_token = policy_loss.of_token(tokens, config.clip)
        if targets.weights is not None:
            per_token = per_token * targets.weights
        kl = value_loss = torch.zeros((), device=scores.logp.device)
        if targets.reference is not None:
            if config.kl_in == "loss":
                divergences = kl_tokens(scores.logp, targets.reference, config.estimator)
                per_token = per_token + config.kl * divergences
            kl = kl_tokens(scores.logp.detach(), targets.reference, "k3").sum()
        if config.critic is not None and scores.values is not None:
            errors = value_losses(scores.values, targets.values, targets.returns, config.critic.clip) * targets.scored
            per_token = per_token + config.critic.weight * errors
            value_loss = errors.detach().sum()
        if config.entropy:
            per_token = per_token - config.entropy * scores.entropy
        total = (per_token * token_weights(batch.row, batch.lengths, policy_loss.aggregation, totals)).sum()
        return Losses(total, scores.entropy.detach().sum(), kl, value_loss, scores.logp.detach(), targets.old)

    def _record(self, losses: Losses, weight: float, metrics: Metrics, ratios: RatioRange) -> None:
        """Add a micro-batch to the metrics, after its backward pass, since reading values from a GPU synchronises."""
        ratios.include((losses.logp - losses.old).exp())
        tokens = weight * len(losses.logp)
        metrics.add("loss", weight * float(losses.total.detach()))
        metrics.add("entropy", weight * float(losses.entropy), tokens)
        if self.config.kl:
            metrics.add("kl", weight * float(losses.kl), tokens)
        if self.config.critic is not None:
            metrics.add("value_loss", weight * float(losses.value_loss), tokens)

    @torch.no_grad()
    def _fix_targets(self, groups: Sequence[Group]) -> None:
        """Compute the targets of all ``groups``, which have completions, before the policy changes."""
        for micro_batch, weight in self._micro_batches(list(groups)):
            batch = pack(micro_batch, self.policy.device)
            targets = self._group_targets(micro_batch, batch, self.policy(batch), weight)
            self._targets |= zip(map(id, micro_batch), targets, strict=True)
        if self.config.critic is not None and self.config.critic.whiten:
            all_targets = list(self._targets.values())
            whitened(all_targets, self._distributed.sum(moments(all_targets)))

    def _targets_for(self, groups: list[Group], batch: Batch, scores: Scores, weight: float) -> Targets:
        """Targets of the packed groups: fixed before the first step, else from this forward pass."""
        if self._targets:
            return joined([self._targets[id(group)] for group in groups])
        return joined(self._group_targets(groups, batch, scores, weight))

    def _group_targets(self, groups: list[Group], batch: Batch, scores: Scores, weight: float) -> list[Targets]:
        """Targets of each packed group from a forward pass of the policy."""
        logp = scores.logp.detach()
        values = torch.zeros_like(logp) if scores.values is None else scores.values.detach()
        reference = self._reference(batch) if self.config.kl and self._reference is not None else None
        old, gap = logp, SamplingGap(groups, logp, weight)
        if self.config.correction is not None:
            sampled = torch.cat([sampled_logps(group) for group in groups]).to(logp)
            weights, capped = correction_weights(logp, sampled, batch.row, len(batch.lengths), self.config.correction)
            gap = SamplingGap(groups, logp, weight, weights, capped)
        elif self._off_policy:
            old = torch.cat([sampled_logps(group) for group in groups]).to(logp)
        self._gaps.append(gap)
        penalties = self.config.kl * (logp - reference) if self.config.in_reward and reference is not None else None
        sizes = [group.tokens() for group in groups]

        def by_group(tokens: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * len(groups) if tokens is None else tokens.split(sizes)

        targets = [
            self._targets_of(*parts)
            for parts in zip(groups, old.split(sizes), values.split(sizes), by_group(penalties), strict=True)
        ]
        for target, of_group, ref in zip(targets, by_group(gap.weights), by_group(reference), strict=True):
            target.weights, target.reference = of_group, ref
        return targets

    def _targets_of(self, group: Group, old: Tensor, values: Tensor, penalties: Tensor | None) -> Targets:
        config = self.config
        if config.critic is not None:
            return targets_of(group, scores_of(group, config), old, values, config.critic, penalties)
        if penalties is not None:
            assign_advantages([group], config, penalties)
        lengths = torch.tensor([len(completion.token_ids) for completion in group.completions])
        per_token = group.advantages.repeat_interleave(lengths).to(old)
        return Targets(old, values, per_token, values, torch.ones_like(values))

    def _clip_gradients(self) -> float:
        """Clip the gradients in place; returns their norm before clipping."""
        weights = [weight for weight in self.policy.parameters() if weight.grad is not None]
        if not weights:
            return 0.0
        norm = nn.utils.clip_grad_norm_(weights, self.config.max_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
