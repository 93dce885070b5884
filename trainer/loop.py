"""Training loop: rollout, reward, advantage, loss, optimizer step; then weight sync, log, validation, checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from ..errors import RunFailed
from ..models.engines.base import EngineDead
from .checkpoint import checkpoints, folder_of, step_of
from .dataset import PromptSampler
from .evaluation.validation import validate
from .log import ACCURACY, VALIDATION, Best, Clock, best_validated, progress_line, read_steps, write_best
from .metrics import UpdateMetrics
from .policy.batch import Group
from .policy.optimizer import rate
from .preflight import template_warnings
from .recipe import Recipe
from .sampling.rollouts import Rollout
from .step_metrics import raised_alarm, refill_metrics, step_metrics
from .training_run import TrainingRun, checkpoint, ended_by
from .update import is_tied


async def train(run: TrainingRun) -> Path:
    """Train to the recipe's last step, or until ``run.stopping``; returns the last checkpoint, --out without any.

    Raises RunFailed on an alarm, after a checkpoint, which is complete by then, however this ends. An error in a step
    ends the run with a checkpoint of the last completed step, if its weights are still there: CapipeErrors are raised
    as they are, others as RunFailed.
    """
    try:
        return await _train(run)
    finally:
        run.checkpoints.finish()


async def _train(run: TrainingRun) -> Path:
    recipe, distributed = run.recipe, run.parts.distributed
    last = folder_of(run.out, run.step) if run.step else run.out
    if distributed.first:
        run.best = best_validated(read_steps(run.out), [step_of(folder) for folder in checkpoints(run.out)])
    try:
        with distributed.agreed():
            if not _validated(run) and await _validate(run) and run.best is not None:
                write_best(run.out, run.best)
        while run.step < recipe.steps:
            if distributed.most(int(run.stopping)):  # agreed by all, as processes get signals at different moments
                return last if run.step in (0, run.model_step) else checkpoint(run, True)
            try:
                last, alarm = await _complete_step(run, last)
            except EngineDead:
                if _stopped_by_signal(run):  # the weights are still those of the previous step
                    continue
                raise
            if alarm:
                raise RunFailed(f"step {run.step}: {alarm}; {last} is as far as it came, and --out has the captions")
    except Exception as error:
        reported = ended_by(run, error, last)
        if reported is error:
            raise
        raise reported from error
    return last


async def _complete_step(run: TrainingRun, last: Path) -> tuple[Path, str | None]:
    """One step with all that follows its update. Returns the last checkpoint, and an alarm's message.

    From the end of the update on the step counts as completed, whatever fails.
    """
    recipe, distributed, clock = run.recipe, run.parts.distributed, Clock()
    rollout, update = await _step(run, clock)
    run.step += 1
    run.unlogged = metrics = _metrics(run, rollout, update)
    alarm = raised_alarm(metrics, recipe.alarms, run.alarms)
    with distributed.agreed():
        if run.demonstrations is None:
            run.log.captions(run.step - 1, rollout.groups, rollout.replaced)
    probe = await _sync_weights(run, clock)
    metrics |= {} if probe is None else {"probe": probe}
    improved = False
    with distributed.agreed():
        if _validates(recipe, run.step):
            with clock.phase("validation"), _engine_may_be_stopped(run):
                improved = await _validate(run)
        _report(run, metrics, clock)
        run.unlogged = None
    improved = bool(distributed.most(int(improved)))
    if _saves(recipe, run.step) or alarm or improved:
        last = checkpoint(run, bool(alarm) or improved or run.step == recipe.steps)
    return last, alarm


async def _step(run: TrainingRun, clock: Clock) -> tuple[Rollout, UpdateMetrics]:
    """Rollout with rewards, then the update: advantages, loss, gradients, optimizer step."""
    with clock.phase("rollout"), run.parts.distributed.agreed():
        off_policy, rollout = run.next_rollout is not None, run.next_rollout
        run.next_rollout = None
        if isinstance(rollout, Exception):
            raise rollout
        if rollout is None:
            rollout = await _rollout(run, run.step)
        await run.sampler.rest()
    _set_learning_rate(run)
    seed_dropout(run.recipe.seed, run.step, run.parts.distributed.rank)
    with clock.phase("update"):
        if _overlaps(run.recipe, run.step + 1):
            return rollout, await _update_during_rollout(run, rollout, off_policy)
        return rollout, run.updater.update(rollout.groups, off_policy)


async def _rollout(run: TrainingRun, step: int) -> Rollout:
    """This process's share of a step's captions with rewards; each caption is scored as soon as it is sampled.

    Or of its given captions. Groups with equal scores are replaced, for ``rollout.refill`` rounds.
    """
    config, distributed = run.recipe.rollout, run.parts.distributed
    prompts = PromptSampler(len(run.examples), config.images, run.recipe.seed)
    share = [(run.examples[index], repeat) for index, repeat in distributed.share(prompts.sample(step))]
    if run.demonstrations is not None:
        return Rollout(await run.demonstrations.collect([example for example, _ in share]))
    groups = await run.rollouts.collect(share, step, run.rewards)
    if not config.refill:
        return Rollout(groups)
    further = [
        [(run.examples[index], repeat) for index, repeat in place]
        for place in distributed.share(prompts.refills(step, config.refill))
    ]
    tied = partial(is_tied, config=run.updater.config)
    return await run.rollouts.refill(groups, further, step, run.rewards, tied)


def _metrics(run: TrainingRun, rollout: Rollout, update: UpdateMetrics) -> dict[str, Any]:
    """Metrics of a step, over all processes."""
    metrics = step_metrics(rollout.groups, update, run.rewards.metrics, run.parts.distributed)
    if not run.recipe.rollout.refill:
        return metrics
    more = refill_metrics(rollout.replaced, run.parts.distributed)
    more["captions_failed"] += metrics["captions_failed"]
    more["failure"] = metrics["failure"] or more["failure"]
    return metrics | more


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
    return recipe.rollout.overlap and not _saves(recipe, step)


def _saves(recipe: Recipe, step: int) -> bool:
    """Whether there is a checkpoint after ``step`` steps, whatever their results."""
    return step % recipe.save_every == 0 or step == recipe.steps


def _validates(recipe: Recipe, step: int) -> bool:
    """Whether validation follows after ``step`` steps."""
    return recipe.validation is not None and (step % recipe.validation.every == 0 or step == recipe.steps)


async def _update_during_rollout(run: TrainingRun, rollout: Rollout, off_policy: bool) -> UpdateMetrics:
    """Run the update in a thread while the next step's captions are sampled; their error is the next step's."""
    following = asyncio.create_task(_rollout(run, run.step + 1))
    try:
        update = await asyncio.to_thread(_update_in_thread, run, rollout.groups, off_policy)
    except BaseException:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        raise
    try:
        run.next_rollout = await following
    except Exception as error:
        run.next_rollout = error
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
        reason = metrics["failure"] or "in another process"
        run.say(f"{metrics['captions_failed']} captions could not be sampled; the first: {reason}")
    if run.step == 1:
        for warning in template_warnings(run.template_rewards, metrics):
            run.say(warning)


def _validated(run: TrainingRun) -> bool:
    """Whether no validation is due at the run's start: before the first step, or one that a failure prevented."""
    if not run.parts.distributed.first or (run.step and not _validates(run.recipe, run.step)):
        return True
    done = (entry for entry in read_steps(run.out) if entry["step"] == run.step - 1)
    return any(name.startswith(VALIDATION) for entry in done for name in entry)


async def _validate(run: TrainingRun) -> bool:
    """Validate in the first process; returns whether this is the best checkpoint so far, which then has to be one.

    With ``rollout.overlap`` only steps that have a checkpoint anyway compete: the next step's captions are sampled.
    """
    if run.validation_reader is None or not run.held_out or not run.parts.distributed.first:
        return False
    captions = await run.rollouts.greedy(run.held_out)
    validation = await validate(run.held_out, captions, run.validation_reader)
    metrics = validation.metrics()
    # Logged under the last completed step, -1 for none: a resumed run does not repeat it.
    run.log.step(run.step - 1, {f"{VALIDATION}{name}": value for name, value in metrics.items()})
    shown = " ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    run.say(f"validation after {run.step} steps: {shown}")
    if validation.failed:
        run.say(
            f"warning: validation: {validation.failed} captions could not be sampled and are left out: "
            f"{validation.reason}"
        )
    value = metrics.get(ACCURACY)
    competes = run.step and (_saves(run.recipe, run.step) or not run.recipe.rollout.overlap)
    if not competes or value is None or (run.best is not None and value <= run.best.value):
        return False
    run.best = Best(run.step, value)
    return True
