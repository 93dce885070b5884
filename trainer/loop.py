"""The training loop: draw captions, score them, update, write it down. Everything it needs is built elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..errors import RunFailed
from ..models.engines.base import EngineDead
from ..models.reader import QuizReader
from .build import PolicyParts, rate, value_weights, write_policy
from .checkpoint import Facts, folder_of, save
from .dataset import Example, PromptSampler
from .distributed import Distributed
from .evaluation.text_statistics import loops
from .log import SECONDS, RunLog
from .policy.batch import Group
from .policy.fsdp import optimizer_state
from .preflight import template_warnings
from .recipe import AlarmConfig, Recipe
from .rewards.base import RewardManager
from .rollouts import Rollouts
from .sampler import Sampler
from .update import Updater, UpdateReport
from .validation import Validation, validate


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Let what an adapter's dropout leaves out depend on the step alone, so that a resumed run leaves out the same."""
    torch.manual_seed(Random(f"dropout:{seed}:{step}:{rank}").getrandbits(63))


@dataclass
class TrainingRun:
    """A run with all its parts, about to do ``step``."""

    recipe: Recipe
    out: Path
    fingerprint: str
    tasks: Sequence[Example]
    held_out: Sequence[Example]
    parts: PolicyParts
    sampler: Sampler
    rollouts: Rollouts
    judge: RewardManager
    grader: QuizReader | None
    updater: Updater
    log: RunLog
    say: Callable[[str], None]
    reader: dict[str, str | None] | None = None  # the quiz's: its name and its digest, for who evaluates
    step: int = 0
    alarms: dict[str, int] = field(default_factory=dict)  # how many steps in a row each was raised
    generic: dict[str, float] = field(default_factory=dict)  # by reward, what a caption of any image was found to earn
    ahead: list[Group] | None = None  # the next step's captions, where they were drawn during the one before
    stopping: bool = False  # a signal asked for the end: the step is finished, a checkpoint written


async def train(run: TrainingRun) -> Path:
    """Do the steps that are left, or those until ``run.stopping``; returns the last checkpoint, --out without any.

    Raises RunFailed on an alarm, after a checkpoint.
    """
    recipe, ranks = run.recipe, run.parts.ranks
    last = folder_of(run.out, run.step) if run.step else run.out
    if run.step == 0:
        await _validate(run)
    while run.step < recipe.steps:
        if ranks.most(int(run.stopping)):  # by all of them, as they get their signals at different moments
            return last if run.step == 0 or last == folder_of(run.out, run.step) else checkpoint(run)
        clock, probe = Clock(), None
        try:
            groups, report = await _advance(run, clock)
        except EngineDead:
            if _ended_too(run):  # the weights are those of the step before
                continue
            raise
        with clock.phase("sync"), _engine_ended_too(run):
            probe = await run.sampler.sync(run.step + 1)
        figures = step_metrics(groups, report, run.judge.figures, ranks)
        figures |= {} if probe is None else {"probe": probe}
        run.log.captions(run.step, groups)
        run.step += 1
        if recipe.validation is not None and (run.step % recipe.validation.every == 0 or run.step == recipe.steps):
            with clock.phase("validation"), _engine_ended_too(run):
                await _validate(run)
        run.log.step(run.step - 1, {**figures, **clock.seconds})
        run.say(line(run.step, recipe.steps, figures, clock))
        if figures["captions_failed"]:
            run.say(f"{figures['captions_failed']} captions could not be sampled; the first: {figures['failure']}")
        if run.step == 1:
            for warning in template_warnings(run.generic, figures):
                run.say(warning)
        alarm = raised(figures, recipe.alarms, run.alarms)
        if run.step % recipe.save_every == 0 or run.step == recipe.steps or alarm:
            last = checkpoint(run)
        if alarm:
            raise RunFailed(f"step {run.step}: {alarm}; {last} is as far as it came, and --out has the captions")
    return last


async def _advance(run: TrainingRun, clock: Clock) -> tuple[list[Group], UpdateReport]:
    """A step's captions and the update by them; with ``rollout.overlap`` the next step's are drawn meanwhile.

    None are drawn ahead over a checkpoint, so that a run resumed there goes on as if it had not stopped.
    """
    recipe, drawn_before = run.recipe, run.ahead is not None
    with clock.phase("rollout"):
        groups = run.ahead or await _rollout(run, run.step)
        await run.sampler.rest()
    for group in run.updater.optimizer.param_groups:
        group["lr"] = group["scale"] * rate(recipe.optimizer, run.step, recipe.steps)
    seed_dropout(recipe.seed, run.step, run.parts.ranks.rank)
    following = run.step + 1
    run.ahead = None
    with clock.phase("update"):
        if not recipe.rollout.overlap or following % recipe.save_every == 0 or following == recipe.steps:
            return groups, run.updater.update(groups, drawn_before)
        drawing = asyncio.create_task(_rollout(run, following))
        try:
            report = await asyncio.to_thread(_update_beside, run, groups, drawn_before)
        except BaseException:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
            raise
        with _engine_ended_too(run):
            run.ahead = await drawing
        return groups, report


def _ended_too(run: TrainingRun) -> bool:
    """Whether an engine's end is that of the run: a scheduler sends its signal to all processes of a job.

    Of several processes that train together one must not leave a step that the others wait in.
    """
    return run.stopping and run.parts.ranks.count == 1


@contextmanager
def _engine_ended_too(run: TrainingRun) -> Iterator[None]:
    """What follows a step's update is left out where the signal that stops the run ended the engine as well."""
    try:
        yield
    except EngineDead:
        if not _ended_too(run):
            raise


async def _rollout(run: TrainingRun, step: int) -> list[Group]:
    """This process's share of a step's captions, scored."""
    schedule = PromptSampler(len(run.tasks), run.recipe.rollout.images, run.recipe.seed)
    mine = run.parts.ranks.share(schedule.sample(step))
    return await run.rollouts.collect([(run.tasks[index], turn) for index, turn in mine], step, run.judge)


def _update_beside(run: TrainingRun, groups: list[Group], drawn_before: bool) -> UpdateReport:
    device = run.parts.policy.device
    if device.type == "cuda":  # which is the current one is told each thread anew
        torch.cuda.set_device(device)
    return run.updater.update(groups, drawn_before)


def checkpoint(run: TrainingRun) -> Path:
    """Write one; all processes take part, as none may have all of the weights."""
    facts = Facts(run.step, run.fingerprint, {"alarms": run.alarms, "reader": run.reader})
    state = optimizer_state(run.parts.policy, run.updater.optimizer)
    head = value_weights(run.parts)
    if run.parts.ranks.first:
        save(run.out, facts, lambda folder: write_policy(run.parts, folder, head), state)
    run.parts.ranks.wait()
    return folder_of(run.out, run.step)


async def _validate(run: TrainingRun) -> Validation | None:
    if run.grader is None or not run.held_out or not run.parts.ranks.first:
        return None
    captions = await run.rollouts.greedy(run.held_out)
    found = await validate(run.held_out, captions, run.grader)
    # Of the last step that was done, or of none: what a resumed run has done already it does not do again.
    run.log.step(run.step - 1, {f"validation/{name}": value for name, value in found.figures().items()})
    told = " ".join(f"{name} {value:.3f}" for name, value in found.figures().items())
    run.say(f"validation after {run.step} steps: {told}")
    if found.failed:
        run.say(f"warning: validation: {found.failed} captions could not be drawn and are left out: {found.reason}")
    return found


def step_metrics(
    groups: Sequence[Group], report: UpdateReport, rewards: Sequence[str], ranks: Distributed
) -> dict[str, Any]:
    """Means over a step's captions of all processes, and the update's own figures. ``rewards``: components' names."""
    summed = ranks.sum(tally(groups, rewards)).tolist()
    captions, tokens, truncated, repeating, scores, scored, failed, *parts = summed
    of_part = zip(rewards, parts[::2], parts[1::2], strict=True)
    return {
        "reward": scores / scored if scored else None,
        **{f"reward/{name}": total / known for name, total, known in of_part if known},
        "tokens_per_caption": tokens / max(1, captions),
        "truncated": truncated / max(1, captions),
        "repeating": repeating / max(1, captions),
        "unscored_share": 1 - scored / captions if captions else 1.0,
        "captions": int(captions),
        "captions_failed": int(failed),
        "failure": next((reason for group in groups for reason in group.failures), None),  # of this process
        **asdict(report),
    }


def tally(groups: Sequence[Group], rewards: Sequence[str]) -> Tensor:
    """What processes add up, float64: captions, tokens, cut ones, looping ones, scores, scored, failed; then of each
    reward the sum of its values and how many there are."""
    captions = [caption for group in groups for caption in group.completions]
    results = [reward for group in groups for reward in group.rewards]
    scores = [each.score for each in results if each.score is not None]
    sums: list[float] = [
        len(captions),
        sum(len(each.token_ids) for each in captions),
        sum(each.finish_reason == "length" for each in captions),
        sum(loops(each.text) for each in captions),
        sum(scores),
        len(scores),
        sum(len(group.failures) for group in groups),
    ]
    for name in rewards:
        values = [value for each in results if (value := each.components.get(name)) is not None]
        sums += [sum(values), len(values)]
    return torch.tensor(sums, dtype=torch.float64)


def raised(figures: dict[str, Any], config: AlarmConfig, counts: dict[str, int]) -> str | None:
    """The alarm that has been raised ``patience`` steps in a row, in words; ``counts`` is kept up to date.

    A step without a single caption is one at once: nothing was learnt, and the next one would fare no better.
    """
    if figures["captions_failed"] and not figures["captions"]:
        reason = figures["failure"] or "another process has the reasons"
        return f"all {figures['captions_failed']} captions of the step failed: {reason}"
    per_caption = figures["kl"] * figures["tokens_per_caption"]
    checks = {
        "truncated": (figures["truncated"], config.truncated, "of the captions are cut at their limit"),
        "repeating": (figures["repeating"], config.repeating, "of the captions loop"),
        "kl": (per_caption, config.kl, "nats per caption away from the start"),
        "unscored": (figures["unscored_share"], config.unscored, "of the captions have no score"),
        "mismatch": (figures.get("mismatch") or 0.0, config.mismatch, "nats a token between the policy and who draws"),
    }
    for name, (value, limit, words) in checks.items():
        counts[name] = counts.get(name, 0) + 1 if value > limit else 0
        if counts[name] >= config.patience:
            return f"{value:.2f} {words} (alarms.{name}: {limit}), {counts[name]} steps in a row"
    return None


def line(step: int, steps: int, figures: dict[str, Any], clock: Clock) -> str:
    """A step in a line for the terminal."""
    reward = "none" if figures["reward"] is None else f"{figures['reward']:.3f}"
    skipped = f" skipped: {figures['skipped']}" if figures["skipped"] else ""
    return (
        f"step {step}/{steps} reward {reward} tokens {figures['tokens_per_caption']:.0f} "
        f"entropy {figures['entropy']:.2f} norm {figures['norm']:.2f} tied {figures['tied']}/{figures['groups']} "
        f"{clock.total():.1f} s{skipped}"
    )


class Clock:
    """Seconds by phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            key = f"{SECONDS}{name}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started

    def total(self) -> float:
        return sum(self.seconds.values())
