"""Policy update from scored groups: advantages, loss, gradients, optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch
from torch import Tensor, nn

from ..errors import RunFailed
from .advantages import Baseline, advantages, tied
from .distributed import ALONE, Distributed
from .losses import ClipRange, KLEstimator, Tokens, Totals, find_loss, kl_tokens, token_weights, value_losses
from .metrics import Metrics
from .policy.batch import Batch, Group, micro_batches, pack
from .policy.critic import CriticConfig, Targets, moments, targets_of, whitened
from .policy.decoder import DecoderPolicy, Scores

Reference = Callable[[Batch], Tensor]  # log-probabilities (tokens,) under the frozen policy, without gradients


@dataclass(frozen=True)
class UpdateConfig:
    """``limit``: longest completion; ``budget``: packed columns in a micro-batch; ``kl``: beta of the KL term.

    ``critic``: advantages from a value head instead of ``baseline``. ``epochs`` passes over the groups, of
    ``minibatches`` optimizer steps each.
    """

    loss: str = "grpo"  # a name of LOSSES or an import path
    baseline: Baseline = "group_std"
    critic: CriticConfig | None = None
    clip: ClipRange = field(default_factory=ClipRange)
    kl: float = 0.0
    estimator: KLEstimator = "k3"
    entropy: float = 0.0
    limit: int = 1024
    budget: int = 16384
    max_norm: float = 1.0
    mask_truncated: bool = False
    epochs: int = 1
    minibatches: int = 1


@dataclass(frozen=True)
class UpdateMetrics:
    """Metrics of an update over all processes. ``skipped``: reason for a step that changed no weights.

    ``mismatch``: mean of |log-probability when sampled - the policy's|, before the update, over the tokens computed;
    None if none was kept, or at a sampling temperature other than 1, which kept log-probabilities do not include.
    """

    loss: float
    norm: float
    entropy: float
    kl: float
    value_loss: float
    ratio_min: float
    ratio_max: float
    tokens: int
    tied: int
    unscored: int
    skipped: str | None = None
    mismatch: float | None = None
    groups: int = 0


def assign_advantages(groups: Sequence[Group], config: UpdateConfig) -> None:
    """Set each group's advantages from its rewards; 0 for unscored completions, and for truncated ones if masked."""
    for group in groups:
        group.advantages = advantages(scores_of(group, config), config.baseline).float()


def is_tied(group: Group, config: UpdateConfig) -> bool:
    """Whether all scores of the group are equal, so that it has no gradient; with a critic it has one."""
    return config.critic is None and tied(scores_of(group, config))


def scores_of(group: Group, config: UpdateConfig) -> Tensor:
    """Scores (completions,), float64; NaN for unscored captions, and for truncated ones if masked."""
    values = [
        float("nan")
        if reward.score is None or (config.mask_truncated and completion.finish_reason == "length")
        else reward.score
        for completion, reward in zip(group.completions, group.rewards, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def sampled_logps(group: Group) -> Tensor:
    """Log-probabilities (tokens,) of a group's tokens when sampled. Raises ValueError if none were kept."""
    rows = [completion.logprobs for completion in group.completions]
    if any(row is None for row in rows):
        raise ValueError(f"{group.key}: captions of older weights need the log-probabilities they were sampled with")
    return torch.tensor([value for row in rows if row is not None for value in row])


def sampling_gaps(groups: Sequence[Group], logp: Tensor) -> Tensor:
    """|log-probability when sampled - ``logp``| of packed tokens, float64; only tokens with a kept one."""
    rows = [
        completion.logprobs or (float("nan"),) * len(completion.token_ids)
        for group in groups
        for completion in group.completions
    ]
    sampled = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    gaps = (sampled - logp.double().cpu()).abs()
    return gaps[~gaps.isnan()]


@dataclass
class RatioRange:
    """Smallest and largest probability ratio of a step's tokens, in this process."""

    low: float = 1.0
    high: float = 1.0

    def include(self, ratios: Tensor) -> None:
        self.low, self.high = min(self.low, float(ratios.min())), max(self.high, float(ratios.max()))


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
    detached ones of the same forward pass, at no extra cost (the ratio is 1 and its gradient exact).
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
        self._off_policy = False  # captions were sampled with older weights
        self._smallest: Group | None = None  # an update's cheapest group to compute

    def update(self, groups: Sequence[Group], off_policy: bool = False) -> UpdateMetrics:
        """All optimizer steps on scored ``groups``. Returns the last step's metrics, with the first one's mismatch.

        ``off_policy``: captions were sampled with older weights, so their sampling log-probabilities are the old ones.
        """
        config = self.config
        assign_advantages(groups, config)
        self._targets, self._off_policy = {}, off_policy
        self._smallest = min((group for group in groups if group.completions), key=Group.tokens, default=None)
        if config.epochs * config.minibatches > 1 or (config.critic is not None and config.critic.whiten):
            self._fix_targets(groups)
        self.policy.train()  # gradient checkpointing and an adapter's dropout are active in training mode only
        try:
            metrics = [self.step(minibatch) for minibatch in self._minibatches(groups)]
        finally:
            self.policy.eval()
        return replace(metrics[-1], mismatch=metrics[0].mismatch)

    def step(self, groups: Sequence[Group]) -> UpdateMetrics:
        """One optimizer step on ``groups`` with assigned advantages.

        Groups without a gradient are not computed but count in the averages; with a KL term or a value head every group
        has one. A non-finite gradient changes nothing and is reported.
        """
        contributing = self._contributing(groups)
        counts = self._counts(groups, contributing).over(self._distributed)
        totals = Totals(int(counts.total("completions")), int(counts.total("tokens")), self.config.limit)
        metrics, ratios = Metrics(("loss", "entropy", "kl", "value_loss", "mismatch")), RatioRange()
        self.optimizer.zero_grad(set_to_none=True)
        for micro_batch, weight in self._micro_batches(contributing):
            losses = self._losses(micro_batch, totals)
            (losses.total * weight * self._distributed.loss_scale).backward()
            self._record(losses, micro_batch, weight, metrics, ratios)
        self._distributed.sum_gradients(self.policy.parameters())
        metrics = metrics.over(self._distributed)
        norm = self._clip_gradients()
        skipped = None
        if not counts.total("contributing"):
            skipped = "no group has scores that differ"
        elif not (math.isfinite(norm) and metrics.finite()):
            skipped = f"the gradient is not finite (norm {norm})"
        if skipped is None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateMetrics(
            loss=metrics.total("loss"),
            norm=norm,
            entropy=metrics.mean("entropy") or 0.0,
            kl=metrics.mean("kl") or 0.0,
            value_loss=metrics.mean("value_loss") or 0.0,
            ratio_min=ratios.low,
            ratio_max=ratios.high,
            tokens=totals.tokens,
            tied=int(counts.total("tied")),
            unscored=int(counts.total("unscored")),
            skipped=skipped,
            mismatch=metrics.mean("mismatch"),
            groups=int(counts.total("groups")),
        )

    def _minibatches(self, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        """All groups in every epoch, shuffled and split; in their original order if there is only one step."""
        epochs, count = self.config.epochs, self.config.minibatches
        if epochs * count == 1:
            yield groups
            return
        for epoch in range(epochs):
            order = Random(f"minibatches:{epoch}").sample(range(len(groups)), len(groups))
            for part in range(count):
                yield [groups[index] for index in order[part::count]]

    def _contributing(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with a gradient."""
        always = bool(self.config.kl) or self.config.critic is not None
        return [group for group in groups if group.completions and (always or bool(group.advantages.any()))]

    def _counts(self, groups: Sequence[Group], contributing: Sequence[Group]) -> Metrics:
        counts = Metrics(("completions", "tokens", "tied", "unscored", "contributing", "groups"))
        numbers = {
            "completions": sum(len(group.completions) for group in groups),
            "tokens": sum(group.tokens() for group in groups),
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

    def _losses(self, groups: list[Group], totals: Totals) -> Losses:
        """Loss of a micro-batch: policy loss, plus KL term, plus value loss, minus entropy bonus."""
        config, policy_loss = self.config, find_loss(self.config.loss)
        batch = pack(groups, self.policy.device)
        scores = self.policy(batch)
        targets = self._targets_for(groups, scores)
        tokens = Tokens(scores.logp, targets.old, targets.advantages, batch.row, len(batch.lengths))
        per_token = policy_loss.of_token(tokens, config.clip)
        kl = value_loss = torch.zeros((), device=scores.logp.device)
        if config.kl:
            assert self._reference is not None
            divergences = kl_tokens(scores.logp, self._reference(batch), config.estimator)
            per_token = per_token + config.kl * divergences
            kl = divergences.detach().sum()
        if config.critic is not None and scores.values is not None:
            errors = value_losses(scores.values, targets.values, targets.returns, config.critic.clip) * targets.scored
            per_token = per_token + config.critic.weight * errors
            value_loss = errors.detach().sum()
        if config.entropy:
            per_token = per_token - config.entropy * scores.entropy
        total = (per_token * token_weights(batch.row, batch.lengths, policy_loss.aggregation, totals)).sum()
        return Losses(total, scores.entropy.detach().sum(), kl, value_loss, scores.logp.detach(), targets.old)

    def _record(self, losses: Losses, groups: list[Group], weight: float, metrics: Metrics, ratios: RatioRange) -> None:
        """Add a micro-batch to the metrics, after its backward pass, since reading values from a GPU synchronises."""
        ratios.include((losses.logp - losses.old).exp())
        tokens = weight * len(losses.logp)
        metrics.add("loss", weight * float(losses.total.detach()))
        metrics.add("entropy", weight * float(losses.entropy), tokens)
        metrics.add("kl", weight * float(losses.kl), tokens)
        metrics.add("value_loss", weight * float(losses.value_loss), tokens)
        if self.policy.temperature == 1:
            gaps = sampling_gaps(groups, losses.logp)
            metrics.add("mismatch", weight * float(gaps.sum()), weight * len(gaps))

    @torch.no_grad()
    def _fix_targets(self, groups: Sequence[Group]) -> None:
        """Compute the targets of all groups before the policy changes."""
        for batch, _ in self._micro_batches([group for group in groups if group.completions]):
            targets = self._group_targets(batch, self.policy(pack(batch, self.policy.device)))
            self._targets |= zip(map(id, batch), targets, strict=True)
        if self.config.critic is not None and self.config.critic.whiten:
            all_targets = list(self._targets.values())
            whitened(all_targets, self._distributed.sum(moments(all_targets)))

    def _targets_for(self, groups: list[Group], scores: Scores) -> Targets:
        """Targets of the packed groups: fixed before the first step, else from this forward pass."""
        if self._targets:
            targets = [self._targets[id(group)] for group in groups]
        else:
            targets = self._group_targets(groups, scores)
        names = ("old", "values", "advantages", "returns", "scored")
        return Targets(*(torch.cat([getattr(target, name) for target in targets]) for name in names))

    def _group_targets(self, groups: list[Group], scores: Scores) -> list[Targets]:
        """Targets of each packed group from a forward pass of the policy."""
        sizes = [group.tokens() for group in groups]
        logps = scores.logp.detach()
        values = torch.zeros_like(logps) if scores.values is None else scores.values.detach()
        split = zip(groups, logps.split(sizes), values.split(sizes), strict=True)
        return [self._targets_of(group, logp, expected) for group, logp, expected in split]

    def _targets_of(self, group: Group, logp: Tensor, values: Tensor) -> Targets:
        if self._off_policy:
            logp = sampled_logps(group).to(logp)
        if self.config.critic is not None:
            return targets_of(group, scores_of(group, self.config), logp, values, self.config.critic)
        lengths = torch.tensor([len(completion.token_ids) for completion in group.completions])
        per_token = group.advantages.repeat_interleave(lengths).to(logp)
        return Targets(logp, values, per_token, values, torch.ones_like(values))

    def _clip_gradients(self) -> float:
        """Clip the gradients in place; returns their norm before clipping."""
        weights = [weight for weight in self.policy.parameters() if weight.grad is not None]
        if not weights:
            return 0.0
        norm = nn.utils.clip_grad_norm_(weights, self.config.max_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
