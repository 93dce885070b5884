"""A training run with all its parts, its checkpoints, and how an error ends it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CapipeError, RunFailed
from ..manifests.files.storage import write_new
from ..models.engines.base import EngineDead
from ..models.reader import QuizReader
from .build import PolicyParts, model_weights, value_weights, write_policy
from .checkpoint import CheckpointWriter, Facts, folder_of
from .dataset import Example
from .distributed import Agreed
from .log import Best, RunLog, write_best
from .policy.state import state_tensors
from .recipe import Recipe
from .rewards.base import RewardManager
from .sampling.rollouts import Demonstrations, Rollout, Rollouts
from .sampling.sampler import Sampler
from .update import Updater

FAILURE = "failure.log"  # traceback of the error that ended a run


@dataclass
class TrainingRun:
    """A run with all its parts; ``step``: the next step. ``demonstrations``: given captions, instead of rollouts."""

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
    demonstrations: Demonstrations | None = None
    next_rollout: Rollout | Exception | None = None  # the next step's, or its error, if it ran during the last update
    unlogged: dict[str, Any] | None = None  # metrics of the completed step, until they are logged
    best: Best | None = None  # the best checkpoint by validation; known to the first process
    stopping: bool = False  # after a signal: finish the step, write a checkpoint, end


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
    facts = Facts(run.step, run.fingerprint, {"alarms": run.alarms, "reader": run.reward_reader})
    if (best := run.best) is None:
        return run.checkpoints.save(facts, state, write)
    return run.checkpoints.save(facts, state, write, best.step, partial(write_best, run.out, best))


def ended_by(run: TrainingRun, error: Exception, last: Path) -> Exception:
    """The error that ends a run after ``error`` in a step: one line, with what the same command goes on from."""
    together = run.parts.distributed.count == 1 or isinstance(error, Agreed)  # all processes are here
    cause = error.error if isinstance(error, Agreed) else error
    kept = _kept(run, last, together)
    if isinstance(cause, CapipeError):
        run.say(kept)
        return cause
    if cause is None:
        return RunFailed(f"another process failed and says why; {kept}")
    if isinstance(cause, EngineDead):
        return RunFailed(f"{cause}; {kept}")
    rank = run.parts.distributed.rank
    file = run.out / (FAILURE if rank == 0 else f"{rank}-{FAILURE}")
    with suppress(OSError):
        write_new(file, "".join(traceback.format_exception(cause)).encode(errors="backslashreplace"))
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    when = f"after step {run.step}" if run.unlogged is not None else f"step {run.step + 1}"
    return RunFailed(f"{when}: {reason} ({file} has the traceback); {kept}")


def _kept(run: TrainingRun, last: Path, together: bool) -> str:
    """Write a checkpoint of the last completed step, if that is possible; says what the same command goes on from.

    It is not possible where an update has changed weights and was not completed, or where other processes, whose part
    of the weights it needs, are elsewhere.
    """
    if run.step and last != folder_of(run.out, run.step) and together and not run.updater.incomplete:
        try:
            if run.unlogged is not None:
                run.log.step(run.step - 1, run.unlogged)
            last = checkpoint(run, model_files=True)
            run.checkpoints.finish()
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return f"no checkpoint of step {run.step} could be written ({reason}); {_goes_on(run, last)}"
    return _goes_on(run, last)


def _goes_on(run: TrainingRun, last: Path) -> str:
    if last == run.out:
        return "there is no checkpoint yet: the same command starts over"
    return f"the same command goes on from {last}"
