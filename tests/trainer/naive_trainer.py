"""A trainer that shares no code with capipe's: one sequence at a time, every formula written out, plain Python floats.

What a sequence is given by the model is transformers' own forward pass; losses, baselines, GAE, whitening, corrections,
clipping of gradients and the order of minibatches are as the recipe's documentation has them, not as the product does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Options of an update; ``lam``: of GAE, with a critic; None without one."""

    loss: str = "grpo"
    baseline: str = "group_std"
    lam: float | None = None
    whiten: bool = True
    value_weight: float = 0.5
    value_clip: float | None = None
    gamma: float = 1.0
    low: float = 0.2
    high: float = 0.28
    cap: float = 1.5
    kl: float = 0.0
    kl_in: str = "loss"
    estimator: str = "k3"
    correction: str | None = None
    correction_cap: float = 1.3
    entropy: float = 0.0
    mask_truncated: bool = False
    epochs: int = 1
    minibatches: int = 1
    limit: int = 12
    max_norm: float = 1e9
    temperature: float = 0.9
    off_policy: bool = False


@dataclass
class Sequence:
    """One completion of a prompt; ``inputs``: of the prompt for the model's own forward pass."""

    inputs: dict[str, Tensor]
    tokens: list[int]
    score: float | None
    truncated: bool
    penalties: list[float]
    sampled: list[float]
    # found before the update
    start: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    old: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


@dataclass
class Scored:
    """Log-probability, entropy and value of each token, (tokens,), with their graph."""

    logp: Tensor
    entropy: Tensor
    values: Tensor | None


def score(model: Any, head: Any, sequence: Sequence, banned: list[int], temperature: float) -> Scored:
    """The whole sequence through the whole model, all its logits, nothing shared."""
    prompt = sequence.inputs["input_ids"]
    ids = torch.cat([prompt, torch.tensor([sequence.tokens])], dim=1)
    inputs = {**sequence.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, len(sequence.tokens))], dim=1)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[0, prompt.shape[1] - 1 : -1]
    logits = model.lm_head(hidden) / temperature
    logits[:, banned] = -math.inf
    logps = torch.log_softmax(logits, dim=1)
    kept = logps[:, [token for token in range(logps.shape[1]) if token not in banned]]
    logp = torch.stack([logps[place, token] for place, token in enumerate(sequence.tokens)])
    values = None if head is None else hidden @ head.weight[0] + head.bias[0]
    return Scored(logp, -(kept.exp() * kept).sum(1), values)


def known_score(sequence: Sequence, settings: Settings) -> float | None:
    return None if settings.mask_truncated and sequence.truncated else sequence.score


def correct(sequence: Sequence, settings: Settings) -> list[float]:
    """Importance weight of each token."""
    if settings.correction is None:
        return [1.0] * len(sequence.tokens)
    ratios = [math.exp(now - then) for now, then in zip(sequence.start, sequence.sampled, strict=True)]
    if settings.correction.startswith("sequence"):
        ratios = [math.prod(ratios)] * len(ratios)
    if settings.correction.endswith("mask"):
        return [0.0 if ratio > settings.correction_cap else ratio for ratio in ratios]
    return [min(ratio, settings.correction_cap) for ratio in ratios]


def baseline_advantages(group: list[Sequence], settings: Settings) -> None:
    scores: list[float | None] = []
    for sequence in group:
        value = known_score(sequence, settings)
        if value is not None and settings.kl and settings.kl_in == "reward":
            value -= settings.kl * sum(a - b for a, b in zip(sequence.start, sequence.reference, strict=True))
        scores.append(value)
    known = [value for value in scores if value is not None]
    tied = len(known) < 2 or max(known) - min(known) < 1e-6
    for sequence, value in zip(group, scores, strict=True):
        advantage = 0.0
        if value is not None and not tied:
            mean = sum(known) / len(known)
            advantage = value - mean
            if settings.baseline == "group_std":
                variance = sum((each - mean) ** 2 for each in known) / (len(known) - 1)
                advantage /= math.sqrt(variance) + 1e-4
            elif settings.baseline == "leave_one_out":
                advantage = value - (sum(known) - value) / (len(known) - 1)
        sequence.advantages = [advantage] * len(sequence.tokens)


def critic_advantages(sequences: list[Sequence], settings: Settings) -> None:
    """GAE by its definition: discounted sums of errors, each written out."""
    assert settings.lam is not None
    for sequence in sequences:
        value, length = known_score(sequence, settings), len(sequence.tokens)
        rewards = [0.0] * length
        if value is not None:
            rewards = list(sequence.penalties) or rewards
            rewards[-1] += value - sum(rewards)
            if settings.kl and settings.kl_in == "reward":
                divergences = [a - b for a, b in zip(sequence.start, sequence.reference, strict=True)]
                rewards = [reward - settings.kl * each for reward, each in zip(rewards, divergences, strict=True)]
        values = [*sequence.values, 0.0]
        errors = [rewards[t] + settings.gamma * values[t + 1] - values[t] for t in range(length)]
        decay = settings.gamma * settings.lam
        whole = [sum(decay ** (k - t) * errors[k] for k in range(t, length)) for t in range(length)]
        sequence.returns = [advantage + values[t] for t, advantage in enumerate(whole)]
        sequence.advantages = whole if value is not None else [0.0] * length
    if settings.whiten:
        known = [sequence for sequence in sequences if known_score(sequence, settings) is not None]
        every = [advantage for sequence in known for advantage in sequence.advantages]
        mean = sum(every) / len(every)
        deviation = math.sqrt(sum((each - mean) ** 2 for each in every) / (len(every) - 1))
        for sequence in known:
            sequence.advantages = [(each - mean) / (deviation + 1e-8) for each in sequence.advantages]


def policy_loss(scored: Scored, sequence: Sequence, settings: Settings) -> Tensor:
    """Per token, (tokens,)."""
    advantages, old = torch.tensor(sequence.advantages), torch.tensor(sequence.old)
    ratio = torch.exp(scored.logp - old)
    if settings.loss == "a2c":
        return -advantages * scored.logp
    if settings.loss == "cispo":
        return -torch.minimum(ratio, torch.tensor(settings.cap)).detach() * advantages * scored.logp
    if settings.loss == "gspo":
        ratio = torch.exp((scored.logp - old).mean()).expand(len(old))
    clipped = torch.minimum(torch.maximum(ratio, torch.tensor(1 - settings.low)), torch.tensor(1 + settings.high))
    return -torch.minimum(ratio * advantages, clipped * advantages)


def sequence_loss(scored: Scored, sequence: Sequence, rows: int, tokens: int, settings: Settings) -> Tensor:
    """A completion's part of an optimizer step's loss."""
    terms = policy_loss(scored, sequence, settings) * torch.tensor(sequence.weights)
    if settings.kl and settings.kl_in == "loss":
        difference = scored.logp - torch.tensor(sequence.reference)
        k3 = torch.exp(-difference) - 1 + difference
        terms = terms + settings.kl * (difference**2 / 2 if settings.estimator == "k2" else k3)
    if scored.values is not None and known_score(sequence, settings) is not None:
        returns, before = torch.tensor(sequence.returns), torch.tensor(sequence.values)
        errors = (scored.values - returns) ** 2
        if settings.value_clip is not None:
            bound = settings.value_clip
            moved = before + torch.clamp(scored.values - before, -bound, bound)
            errors = torch.maximum(errors, (moved - returns) ** 2)
        terms = terms + settings.value_weight * errors / 2
    terms = terms - settings.entropy * scored.entropy
    if settings.loss in ("grpo", "gspo"):  # the mean over completions of the mean over tokens
        return terms.mean() / rows
    if settings.loss == "dr_grpo":
        return terms.sum() / (rows * settings.limit)
    return terms.sum() / tokens


def before_update(
    model: Any, head: Any, reference: Any, groups: list[list[Sequence]], banned: list[int], settings: Settings
) -> None:
    """Log-probabilities, values, corrections and advantages, from the weights that have not changed yet."""
    sequences = [sequence for group in groups for sequence in group]
    for sequence in sequences:
        with torch.no_grad():
            scored = score(model, head, sequence, banned, settings.temperature)
            sequence.start = scored.logp.tolist()
            sequence.values = [] if scored.values is None else scored.values.tolist()
            sequence.reference = score(reference, None, sequence, banned, settings.temperature).logp.tolist()
        sequence.old = sequence.sampled if settings.off_policy and settings.correction is None else sequence.start
        sequence.weights = correct(sequence, settings)
    if settings.lam is not None:
        critic_advantages(sequences, settings)
    else:
        for group in groups:
            baseline_advantages(group, settings)


def update(
    model: Any,
    head: Any,
    reference: Any,
    optimizer: torch.optim.Optimizer,
    groups: list[list[Sequence]],
    banned: list[int],
    settings: Settings,
) -> None:
    """All optimizer steps of an update."""
    before_update(model, head, reference, groups, banned, settings)
    weights = [weight for each in optimizer.param_groups for weight in each["params"]]
    for epoch in range(settings.epochs):
        order = list(range(len(groups)))
        if settings.epochs * settings.minibatches > 1:
            order = Random(f"minibatches:{epoch}").sample(order, len(order))
        for part in range(settings.minibatches):
            chosen = [sequence for index in order[part :: settings.minibatches] for sequence in groups[index]]
            tokens = sum(len(sequence.tokens) for sequence in chosen)
            optimizer.zero_grad()
            for sequence in chosen:
                scored = score(model, head, sequence, banned, settings.temperature)
                sequence_loss(scored, sequence, len(chosen), tokens, settings).backward()
            norm = math.sqrt(sum(float((w.grad**2).sum()) for w in weights if w.grad is not None))
            for weight in weights:
                if weight.grad is not None and norm > settings.max_norm:
                    weight.grad *= settings.max_norm / norm
            optimizer.step()
