"""Training loop: rollout, reward, advantage, loss, optimizer step; then weight sync, log, validation, checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from ..errors import RunFailed
from ..models.engines.base import EngineDead
from ..models.reader import QuizReader
from .build import PolicyParts, model_weights, value_weights, write_policy
from .checkpoint import CheckpointWriter, Facts, folder_of
from .dataset import Example, PromptSampler
from .evaluation.validation import validate
from .log import Clock, RunLog, progress_line
from .policy.batch import Group
from .policy.optimizer import rate
from .policy.state import state_tensors
from .preflight import template_warnings
from .recipe import Recipe
from .rewards.base import RewardManager
from .rollouts import Rollouts
from .sampler import Sampler
from .step_metrics import raised_alarm, step_metrics
from .update import UpdateMetrics, Updater


@dataclass
class TrainingRun:
    """A run with all its parts; ``step``: the next step."""

    recipe: Recipe
    out: Path
    fingerprint: str
    examples: Sequence[Example]
    held_out: Sequence[Example]
    parts: PolicyParts
    sampler: Sampler
    rollouts: Rollouts
    rewards: RewardManager
    validation_reader: QuizReader | None
    updater: Updater
    log: RunLog
    say: Callable[[str], None]
    checkpoints: CheckpointWriter
    reward_reader: dict[str, str | None] | None = None  # name and digest of the quiz reader, for `capipe eval`
    step: int = 0
    model_step: int = 0  # of the last checkpoint that is a Hugging Face folder
    alarms: dict[str, int] = field(default_factory=dict)  # consecutive steps that raised an alarm, by name
    template_rewards: dict[str, float] = field(default_factory=dict)  # mean reward of a generic caption, by reward
    next_groups: list[Group] | None = None  # the next step's rollout, if it ran during the last update
    stopping: bool = False  # after a signal: finish the step, write a checkpoint, end


async def train(run: TrainingRun) -> Path:
    """Train to the recipe's last step, or until ``run.stopping``; returns the last checkpoint, --out without any.

    Raises RunFailed on an alarm, after a checkpoint, which is complete by then, however this ends.
    """
    try:
        return await _train(run)
    finally:
        run.checkpoints.finish()


async def _train(run: TrainingRun) -> Path:
    recipe, distributed = run.recipe, run.parts.distributed
    last = folder_of(run.out, run.step) if run.step else run.out
    if run.step == 0:
        await _validate(run)
    while run.step < recipe.steps:
        if distributed.most(int(run.stopping)):  # agreed by all, as processes get signals at different moments
            return last if run.step in (0, run.model_step) else checkpoint(run, True)
        clock = Clock()
        try:
            groups, update = await _step(run, clock)
        except EngineDead:
            if _stopped_by_signal(run):  # the weights are still those of the previous step
                continue
            raise
        probe = await _sync_weights(run, clock)
        metrics = step_metrics(groups, update, run.rewards.metrics, distributed)
        metrics |= {} if probe is None else {"probe": probe}
        run.log.captions(run.step, groups)
        run.step += 1
        if recipe.validation is not None and (run.step % recipe.validation.every == 0 or run.step == recipe.steps):
            with clock.phase("validation"), _engine_may_be_stopped(run):
                await _validate(run)
        _report(run, metrics, clock)
        alarm = raised_alarm(metrics, recipe.alarms, run.alarms)
        if run.step % recipe.save_every == 0 or run.step == recipe.steps or alarm:
            last = checkpoint(run, bool(alarm) or run.step == recipe.steps)
        if alarm:
            raise RunFailed(f"step {run.step}: {alarm}; {last} is as far as it came, and --out has the captions")
    return last


async def _step(run: TrainingRun, clock: Clock) -> tuple[list[Group], UpdateMetrics]:
    """Rollout with rewards, then the update: advantages, loss, gradients, optimizer step."""
    with clock.phase("rollout"):
        off_policy = run.next_groups is not None
        groups = run.next_groups or await _rollout(run, run.step)
        await run.sampler.rest()
    run.next_groups = None
    _set_learning_rate(run)
    seed_dropout(run.recipe.seed, run.step, run.parts.distributed.rank)
    with clock.phase("update"):
        if _overlaps(run.recipe, run.step + 1):
            return groups, await _update_during_rollout(run, groups, off_policy)
        return groups, run.updater.update(groups, off_policy)


async def _rollout(run: TrainingRun, step: int) -> list[Group]:
    """This process's share of a step's captions with rewards; each caption is scored as soon as it is sampled."""
    prompts = PromptSampler(len(run.examples), run.recipe.rollout.images, run.recipe.seed).sample(step)
    share = [(run.examples[index], repeat) for index, repeat in run.parts.distributed.share(prompts)]
    return await run.rollouts.collect(share, step, run.rewards)


def _set_learning_rate(run: TrainingRun) -> None:
    for group in run.updater.optimizer.param_groups:
        group["lr"] = group["scale"] * rate(run.recipe.optimizer, run.step, run.recipe.steps)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make an adapter's dropout depend on the step only, so that a resumed run repeats it."""
    torch.manual_seed(Random(f"dropout:{seed}:{step}:{rank}").getrandbits(63))


def _overlaps(recipe: Recipe, step: int) -> bool:
    """Whether ``step``'s rollout runs during the previous update; never across a checkpoint.

    So a run resumed from a checkpoint is identical to an uninterrupted one.
    """
    return recipe.rollout.overlap and step % recipe.save_every != 0 and step != recipe.steps


async def _update_during_rollout(run: TrainingRun, groups: list[Group], off_policy: bool) -> UpdateMetrics:
    """Run the update in a thread while the next step's captions are sampled."""
    rollout = asyncio.create_task(_rollout(run, run.step + 1))
    try:
        update = await asyncio.to_thread(_update_in_thread, run, groups, off_policy)
    except BaseException:
        rollout.cancel()
        await asyncio.gather(rollout, return_exceptions=True)
        raise
    with _engine_may_be_stopped(run):
        run.next_groups = await rollout
    return update


def _update_in_thread(run: TrainingRun, groups: list[Group], off_policy: bool) -> UpdateMetrics:
    device = run.parts.policy.device
    if device.type == "cuda":  # the current device is set per thread
        torch.cuda.set_device(device)
    return run.updater.update(groups, off_policy)


async def _sync_weights(run: TrainingRun, clock: Clock) -> float | None:
    """Send the new weights to the rollout engine; returns the probe's difference, if there is a probe."""
    with clock.phase("sync"), _engine_may_be_stopped(run):
        return await run.sampler.sync(run.step + 1)
    return None


def _stopped_by_signal(run: TrainingRun) -> bool:
    """Whether the signal that stops the run also ended its engine: a scheduler signals all processes of a job.

    False with several training processes: one must not leave a step in which the others wait.
    """
    return run.stopping and run.parts.distributed.count == 1


@contextmanager
def _engine_may_be_stopped(run: TrainingRun) -> Iterator[None]:
    """Ignore the engine's death after a step's update if the signal that stops the run caused it."""
    try:
        yield
    except EngineDead:
        if not _stopped_by_signal(run):
            raise


def _report(run: TrainingRun, metrics: dict[str, Any], clock: Clock) -> None:
    """Log the step before ``run.step``; print its line and warnings."""
    run.log.step(run.step - 1, {**metrics, **clock.seconds})
    run.say(progress_line(run.step, run.recipe.steps, metrics, clock))
    if metrics["captions_failed"]:
        run.say(f"{metrics['captions_failed']} captions could not be sampled; the first: {metrics['failure']}")
    if run.step == 1:
        for warning in template_warnings(run.template_rewards, metrics):
            run.say(warning)


async def _validate(run: TrainingRun) -> None:
    if run.validation_reader is None or not run.held_out or not run.parts.distributed.first:
        return
    captions = await run.rollouts.greedy(run.held_out)
    validation = await validate(run.held_out, captions, run.validation_reader)
    metrics = validation.metrics()
    # Logged under the last completed step, -1 for none: a resumed run does not repeat it.
    run.log.step(run.step - 1, {f"validation/{name}": value for name, value in metrics.items()})
    shown = " ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    run.say(f"validation after {run.step} steps: {shown}")
    if validation.failed:
        run.say(
            f"warning: validation: {validation.failed} captions could not be sampled and are left out: "
            f"{validation.reason}"
        )


def checkpoint(run: TrainingRun, model_files: bool = False) -> Path:
    """Begin to write a checkpoint, which training need not wait for; a collective call for all processes.

    ``model_files``: as a Hugging Face folder, too, even where the recipe writes one for the last step only.
    """
    parts, write = run.parts, None
    state = state_tensors(parts.policy, run.updater.optimizer)
    if model_files or run.recipe.every_is_model(parts.policy.model_bytes()):
        weights, head = model_weights(parts), value_weights(parts)
        write = partial(write_policy, parts, values=head, weights=weights)
        run.model_step = run.step
    return run.checkpoints.save(
        Facts(run.step, run.fingerprint, {"alarms": run.alarms, "reader": run.reward_reader}), state, write
    )
