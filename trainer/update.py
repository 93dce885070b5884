"""One update of the policy from scored groups: log-probabilities, loss, gradients, the optimiser's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch
from torch import Tensor, nn

from ..errors import RunFailed
from .advantages import Baseline, advantages, tied
from .distributed import ALONE, Distributed
from .losses import LOSSES, ClipRange, KLEstimator, LossName, Tokens, Totals, kl_tokens, token_weights, value_losses
from .policy.batch import Batch, Group, micro_batches, pack
from .policy.critic import CriticConfig, Targets, moments, targets_of, whitened
from .policy.decoder import DecoderPolicy, Scores

Reference = Callable[[Batch], Tensor]  # log-probabilities (tokens,) under the frozen policy, without gradients


@dataclass(frozen=True)
class UpdateConfig:
    """``limit``: the longest completion; ``budget``: packed columns in a micro-batch; ``kl``: beta of the KL term.

    ``critic``: advantages from a value head instead of ``baseline``. ``epochs`` times over the groups, in
    ``minibatches`` optimiser steps each.
    """

    loss: LossName = "grpo"
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
class UpdateReport:
    """Figures of an update, over all processes. ``skipped``: why a step changed nothing, where one did not.

    ``mismatch``: mean of |log-probability when drawn - the policy's|, before it changed, over the tokens computed; None
    where none was kept, or captions are drawn at another temperature than 1, which what was kept leaves out.
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
    """Set each group's advantages from its rewards; an unscored completion, or a cut one where masked, gets 0."""
    for group in groups:
        group.advantages = advantages(scores_of(group, config), config.baseline).float()


def is_tied(group: Group, config: UpdateConfig) -> bool:
    """Whether the group has nothing to teach: no two scores that differ."""
    return tied(scores_of(group, config))


def scores_of(group: Group, config: UpdateConfig) -> Tensor:
    """Scores (completions,), float64; NaN where there is none, and for cut captions where these are masked."""
    values = [
        float("nan")
        if reward.score is None or (config.mask_truncated and completion.finish_reason == "length")
        else reward.score
        for completion, reward in zip(group.completions, group.rewards, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def sampled_logps(group: Group) -> Tensor:
    """Log-probabilities (tokens,) of a group's tokens when they were drawn. Raises ValueError where none were kept."""
    rows = [completion.logprobs for completion in group.completions]
    if any(row is None for row in rows):
        raise ValueError(f"{group.key}: captions of older weights need the log-probabilities they were drawn with")
    return torch.tensor([value for row in rows if row is not None for value in row])


def mismatch(part: Sequence[Group], logp: Tensor) -> Tensor:
    """Sum and count, float64 (2,), of how far packed ``logp`` (tokens,) is from that of drawing, where it was kept."""
    drawn = [each.logprobs or (float("nan"),) * len(each.token_ids) for group in part for each in group.completions]
    gaps = (torch.tensor([value for row in drawn for value in row], dtype=torch.float64) - logp.double().cpu()).abs()
    known = gaps[~gaps.isnan()]
    return torch.stack([known.sum(), torch.tensor(float(len(known)), dtype=torch.float64)])


class Updater:
    """Changes ``policy`` by ``optimizer``. ``reference``: the KL term's frozen policy, needed where ``kl`` is not 0.

    On-policy, with one step per rollout, the sampling policy is the policy itself: its log-probabilities are those just
    computed, detached, and no pass is spent on them (the ratio is 1 and its gradient exact).
    """

    def __init__(
        self,
        policy: DecoderPolicy,
        optimizer: torch.optim.Optimizer,
        config: UpdateConfig,
        reference: Reference | None = None,
        ranks: Distributed = ALONE,
    ) -> None:
        if config.kl and reference is None:
            raise ValueError("a KL term needs the reference policy")
        if config.critic is not None and policy.value_head is None:
            raise ValueError("advantages from a critic need a policy with a value head")
        self.policy, self.optimizer, self.config = policy, optimizer, config
        self._reference, self._ranks = reference, ranks
        self._targets: dict[int, Targets] = {}  # by id of the group
        self._stale = False
        self._spare: Group | None = None  # the cheapest to compute of an update's groups

    def update(self, groups: Sequence[Group], sampled_by_other: bool = False) -> UpdateReport:
        """All optimiser steps on scored ``groups``; the report is the last step's.

        ``sampled_by_other``: the captions are of older weights, so their own log-probabilities are the old ones.
        """
        config = self.config
        assign_advantages(groups, config)
        self._targets, self._stale = {}, sampled_by_other
        self._spare = min((group for group in groups if group.completions), key=Group.tokens, default=None)
        several = config.epochs * config.minibatches > 1
        if several or (config.critic is not None and config.critic.whiten):
            self._remember(groups)
        report = gap = None
        self.policy.train()  # gradient checkpointing and an adapter's dropout are on in training alone
        try:
            for epoch in range(config.epochs):
                order = Random(f"minibatches:{epoch}").sample(range(len(groups)), len(groups))
                for part in range(config.minibatches):
                    chosen = [groups[index] for index in order[part :: config.minibatches]] if several else groups
                    report = self.step(chosen)
                    gap = report.mismatch if epoch == part == 0 else gap
        finally:
            self.policy.eval()
        assert report is not None
        return replace(report, mismatch=gap)

    @torch.no_grad()
    def _remember(self, groups: Sequence[Group]) -> None:
        """What the policy thinks of the captions before it changes."""
        for part, _ in self._parts([group for group in groups if group.completions]):
            batch = pack(part, self.policy.device)
            scores = self.policy(batch)
            values = torch.zeros_like(scores.logp) if scores.values is None else scores.values
            self._targets |= {
                id(group): self._targets_of(group, logp, expected)
                for group, logp, expected in zip(part, _split(scores.logp, part), _split(values, part), strict=True)
            }
        if self.config.critic is not None and self.config.critic.whiten:
            found = list(self._targets.values())
            whitened(found, self._ranks.sum(moments(found)))

    def _targets_of(self, group: Group, logp: Tensor, values: Tensor) -> Targets:
        if self._stale:
            logp = sampled_logps(group).to(logp)
        if self.config.critic is not None:
            return targets_of(group, scores_of(group, self.config), logp, values, self.config.critic)
        lengths = torch.tensor([len(each.token_ids) for each in group.completions])
        per_token = group.advantages.repeat_interleave(lengths).to(logp)
        return Targets(logp, values, per_token, values, torch.ones_like(values))

    def step(self, groups: Sequence[Group]) -> UpdateReport:
        """One optimiser step on ``groups``, whose advantages are set.

        Groups that teach nothing cost nothing but count in the averages; where a KL term or a value head has something
        to say of them they take part. A gradient that is not finite changes nothing and is reported.
        """
        config = self.config
        usable = [group for group in groups if group.completions]
        always = bool(config.kl) or config.critic is not None
        chosen = [group for group in usable if always or bool(group.advantages.any())]
        counts = [
            sum(len(group.completions) for group in usable),
            sum(group.tokens() for group in usable),
            sum(is_tied(group, config) for group in groups),
            sum(each.score is None for group in groups for each in group.rewards),
            len(chosen),
            len(groups),
        ]
        summed = self._ranks.sum(torch.tensor(counts, dtype=torch.float64))
        rows, tokens, ties, unscored, teaching, drawn = (int(count) for count in summed)
        totals = Totals(rows, tokens, config.limit)
        self.optimizer.zero_grad(set_to_none=True)
        # Loss, entropy, KL, value loss, scored tokens; then the mismatch, and of how many tokens it is known.
        sums = torch.zeros(7, dtype=torch.float64)
        ratios = [1.0, 1.0]
        for part, counted in self._parts(chosen):
            sums += counted * self._backward(part, totals, ratios, counted)
        self._ranks.sum_gradients(self.policy.parameters())
        sums = self._ranks.sum(sums)
        norm = self._norm()
        skipped = None
        if not teaching:
            skipped = "no group has scores that differ"
        elif not (torch.tensor(norm).isfinite() and bool(sums.isfinite().all())):
            skipped = f"the gradient is not finite (norm {norm})"
        if skipped is None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seen = max(1.0, float(sums[4]))
        loss, entropy, kl, value_loss = (sums[:4] / torch.tensor([1.0, seen, seen, seen], dtype=torch.float64)).tolist()
        figures = (loss, norm, entropy, kl, value_loss, ratios[0], ratios[1], tokens, ties, unscored, skipped)
        return UpdateReport(*figures, float(sums[5] / sums[6]) if sums[6] else None, drawn)

    def _parts(self, chosen: list[Group]) -> list[tuple[list[Group], float]]:
        """Micro-batches, and what each counts.

        Processes that share sharded weights must compute equally often: who has less to do repeats something for 0.
        """
        parts = [(part, 1.0) for part in micro_batches(chosen, self.config.budget)]
        if not self._ranks.sharded:
            return parts
        missing = self._ranks.most(len(parts)) - len(parts)
        if missing and self._spare is None:
            raise RunFailed("none of this process's captions could be sampled, and split weights need some of each")
        return parts + [([self._spare], 0.0)] * missing if self._spare else parts

    def _backward(self, part: list[Group], totals: Totals, ratios: list[float], counted: float) -> Tensor:
        config, loss = self.config, LOSSES[self.config.loss]
        batch = pack(part, self.policy.device)
        scores = self.policy(batch)
        targets = self._known(part, scores)
        tokens = Tokens(scores.logp, targets.old, targets.advantages, batch.row, len(batch.lengths))
        values = loss.of_token(tokens, config.clip)
        divergence = value_error = torch.zeros((), device=scores.logp.device)
        if config.kl:
            assert self._reference is not None
            of_token = kl_tokens(scores.logp, self._reference(batch), config.estimator)
            values = values + config.kl * of_token
            divergence = of_token.detach().sum()
        if config.critic is not None and scores.values is not None:
            errors = value_losses(scores.values, targets.values, targets.returns, config.critic.clip) * targets.scored
            values = values + config.critic.weight * errors
            value_error = errors.detach().sum()
        if config.entropy:
            values = values - config.entropy * scores.entropy
        total = (values * token_weights(batch.row, batch.lengths, loss.aggregation, totals)).sum()
        (total * counted * self._ranks.loss_scale).backward()
        ratio = (scores.logp.detach() - targets.old).exp()
        ratios[0], ratios[1] = min(ratios[0], float(ratio.min())), max(ratios[1], float(ratio.max()))
        count = torch.tensor(float(len(ratio)))
        figures = [total.detach(), scores.entropy.detach().sum(), divergence, value_error, count]
        gap = mismatch(part, scores.logp.detach()) if self.policy.temperature == 1 else torch.zeros(2)
        return torch.cat([torch.stack([each.double().cpu() for each in figures]), gap])

    def _known(self, part: list[Group], scores: Scores) -> Targets:
        """The part's targets, from before the first step where that was asked for, else from this very pass."""
        if not self._targets:
            logp = scores.logp.detach()
            values = torch.zeros_like(logp) if scores.values is None else scores.values.detach()
            found = [
                self._targets_of(group, old, expected)
                for group, old, expected in zip(part, _split(logp, part), _split(values, part), strict=True)
            ]
        else:
            found = [self._targets[id(group)] for group in part]
        names = ("old", "values", "advantages", "returns", "scored")
        return Targets(*(torch.cat([getattr(each, name) for each in found]) for name in names))

    def _norm(self) -> float:
        weights = [weight for weight in self.policy.parameters() if weight.grad is not None]
        if not weights:
            return 0.0
        norm = nn.utils.clip_grad_norm_(weights, self.config.max_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _split(values: Tensor, part: list[Group]) -> list[Tensor]:
    """(tokens,) of packed groups -> one (tokens,) for each."""
    return list(values.split([group.tokens() for group in part]))
