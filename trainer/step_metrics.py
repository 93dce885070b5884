"""Metrics of a training step (captions and update), and alarms on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .distributed import Distributed
from .evaluation.text_statistics import loops
from .metrics import Metrics, UpdateMetrics
from .policy.batch import Group
from .recipe_sections import AlarmConfig


def step_metrics(
    groups: Sequence[Group], update: UpdateMetrics, rewards: Sequence[str], distributed: Distributed
) -> dict[str, Any]:
    """Means over a step's captions of all processes, and the update's metrics. ``rewards``: names of components.

    Without rewards no caption counts as unscored.
    """
    metrics = caption_metrics(groups, rewards).over(distributed)
    captions, scored = metrics.count("tokens_per_caption"), metrics.count("reward")
    means = {f"reward/{name}": metrics.mean(f"reward/{name}") for name in rewards}
    return {
        "reward": metrics.mean("reward"),
        **{name: mean for name, mean in means.items() if mean is not None},
        "tokens_per_caption": metrics.mean("tokens_per_caption") or 0.0,
        "truncated": metrics.mean("truncated") or 0.0,
        "repeating": metrics.mean("repeating") or 0.0,
        "unscored_share": (1 - scored / captions if captions else 1.0) if rewards else 0.0,
        "captions": captions,
        "captions_failed": int(metrics.total("captions_failed")),
        "failure": next((reason for group in groups for reason in group.failures), None),  # in this process
        **asdict(update),
    }


def refill_metrics(replaced: Sequence[Group], distributed: Distributed) -> dict[str, Any]:
    """Replaced groups of all processes: their number, and the mean reward of their captions, in no other mean."""
    metrics = Metrics(["refilled", "refilled/reward", "captions_failed"])
    metrics.extend("refilled", [1.0] * len(replaced))
    results = [result for group in replaced for result in group.rewards]
    metrics.extend("refilled/reward", [result.score for result in results if result.score is not None])
    metrics.extend("captions_failed", [len(group.failures) for group in replaced])
    metrics = metrics.over(distributed)
    reward = metrics.mean("refilled/reward")
    return {
        "refilled": int(metrics.total("refilled")),
        **({} if reward is None else {"refilled/reward": reward}),
        "captions_failed": int(metrics.total("captions_failed")),
        "failure": next((reason for group in replaced for reason in group.failures), None),
    }


def caption_metrics(groups: Sequence[Group], rewards: Sequence[str]) -> Metrics:
    """Metrics of this process's captions; a reward's count is the number of captions that it scored."""
    per_caption = ("tokens_per_caption", "truncated", "repeating", "reward", "captions_failed")
    metrics = Metrics([*per_caption, *(f"reward/{name}" for name in rewards)])
    captions = [caption for group in groups for caption in group.completions]
    results = [result for group in groups for result in group.rewards]
    metrics.extend("tokens_per_caption", [len(caption.token_ids) for caption in captions])
    metrics.extend("truncated", [caption.finish_reason == "length" for caption in captions])
    metrics.extend("repeating", [loops(caption.text) for caption in captions])
    metrics.extend("reward", [result.score for result in results if result.score is not None])
    metrics.extend("captions_failed", [len(group.failures) for group in groups])
    for name in rewards:
        values = [result.components.get(name) for result in results]
        metrics.extend(f"reward/{name}", [value for value in values if value is not None])
    return metrics


def raised_alarm(metrics: dict[str, Any], config: AlarmConfig, counts: dict[str, int]) -> str | None:
    """Message of an alarm raised ``patience`` steps in a row, if any; updates ``counts``.

    A step without any caption raises one at once: nothing was learned, and the next step would fail as well.
    """
    if metrics["captions_failed"] and not metrics["captions"]:
        reason = metrics["failure"] or "another process has the reasons"
        return f"all {metrics['captions_failed']} captions of the step failed: {reason}"
    kl_per_caption = (metrics["kl"] or 0.0) * metrics["tokens_per_caption"]
    checks = {
        "truncated": (metrics["truncated"], config.truncated, "of the captions are cut at their limit"),
        "repeating": (metrics["repeating"], config.repeating, "of the captions loop"),
        "kl": (kl_per_caption, config.kl, "nats per caption away from the start"),
        "unscored": (metrics["unscored_share"], config.unscored, "of the captions have no score"),
        "mismatch": (
            metrics.get("mismatch") or 0.0,
            config.mismatch,
            "nats a token between the policy and the rollout engine",
        ),
    }
    for name, (value, limit, words) in checks.items():
        counts[name] = counts.get(name, 0) + 1 if value > limit else 0
        if counts[name] >= config.patience:
            return f"{value:.2f} {words} (alarms.{name}: {limit}), {counts[name]} steps in a row"
    return None
