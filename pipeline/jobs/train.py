"""Setup of a training run from a recipe, up to its first or next step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from ...errors import ArtifactMismatch, BadInput, RunFailed
from ...manifests.files import bounded_json
from ...manifests.files.overwriting import refuse_overwriting
from ...manifests.files.redaction import redacted_data
from ...manifests.files.storage import remove, unfinished, write_new
from ...manifests.fingerprint import differences, fingerprint
from ...manifests.shards import expand, read_places
from ...models.engines.base import Engine, EngineDead, Prompt, RequestError
from ...models.engines.context import image_tokens
from ...models.engines.hf.engine import TransformersEngine
from ...models.engines.hf.model_adapter import PreparedPrompt
from ...models.engines.loading import model_identity
from ...models.reader import QuizReader, ReaderConfig
from ...models.scorers.loading import ScorerConfig, scorer_identity
from ...trainer.build import PolicyParts, load_policy, place_policy
from ...trainer.checkpoint import CheckpointWriter, Facts, is_model_folder, newest, older_optimizer_state
from ...trainer.dataset import ExampleList, load_captioned, load_examples
from ...trainer.distributed import join
from ...trainer.evaluation.ability import ability_of, cautions
from ...trainer.log import BEST, RunLog, Sink, TensorBoard, WandB
from ...trainer.loop import train
from ...trainer.losses import ClipRange
from ...trainer.memory import check_memory
from ...trainer.policy.critic import CriticConfig
from ...trainer.policy.fsdp import restore_optimizer
from ...trainer.policy.optimizer import build_optimizer
from ...trainer.policy.packing_check import check_packing
from ...trainer.policy.state import load_optimizer
from ...trainer.preflight import IMAGES, ability, controls, floors, refuse_reader, refuse_templates
from ...trainer.recipe import Recipe
from ...trainer.rewards.base import RewardManager
from ...trainer.rewards.build import build_reward_manager
from ...trainer.rewards.image_text import BlipRewardConfig, ClipRewardConfig, ItmRewardConfig
from ...trainer.rewards.quiz import QuizReward, load_reader
from ...trainer.sampling.rollouts import Demonstrations, Rollouts, RolloutSampling
from ...trainer.sampling.sampler import Sampler, build_sampler
from ...trainer.training_run import FAILURE, TrainingRun
from ...trainer.update import UpdateConfig, Updater
from ..runners.interrupts import interrupts
from ..runners.interrupts import say as say_at_once
from .artifacts import question_artifact
from .train_checks import check_fits, reward_reader

RUN = "run.json"  # a run's settings at its start
MARK = "step-"  # prefix of a run's other outputs, except logs
Say = Callable[[str], None]


async def run_training(recipe: Recipe, out: Path, *, fresh: bool, say: Say) -> Path:
    """Train to the recipe's end, from the newest checkpoint in ``out`` if there is one.

    Returns the last checkpoint: that of the step at which a signal requested the end, or ``out`` if there is none yet.
    """
    disable_progress_bar()  # otherwise each checkpoint, and each weight sync to vLLM, shows one
    distributed = join(recipe.parallel == "sharded")
    if recipe.rollout.images < distributed.count:
        raise BadInput(
            f"{distributed.count} processes for {recipe.rollout.images} images a step: start fewer, or raise "
            "rollout.images"
        )
    if not distributed.first:
        say = _quiet
    refuse_overwriting(str(out), _read(recipe))
    training, held_out = load_data(recipe)
    rewarding = reward_reader(recipe)
    semantic = {
        **recipe.semantic(),
        **({} if rewarding is None else {"reader": rewarding.digest or rewarding.name}),
        "model": model_identity(recipe.model, "").digest,
        **_scorers(recipe),
        _trained_on(recipe): training.fingerprint,
    }
    mark, resumed = fingerprint(semantic), _look(out, semantic, fresh)
    parts = load_policy(recipe, resumed[0] if resumed else None, distributed)
    say(parts.learning)
    for line in check_memory(recipe, parts.policy, image_tokens(parts.grid), distributed):
        say(line)
    rewards = await build_reward_manager(recipe.rewards, parts.preparing.encoder.decode, recipe.rollout.max_tokens)
    grader: QuizReader | None = None
    sampler: Sampler | None = None
    try:
        if recipe.validation is not None:
            validation, longest = recipe.validation, recipe.rollout.max_tokens
            asks = ReaderConfig(mode=validation.mode)
            reader = await load_reader(validation.reader, validation.engine, longest, asks, validation.template_args)
            grader = QuizReader(reader, asks)
            if "://" in validation.engine:
                await grader.check()
        await check_fits(recipe, rewards, grader, training, held_out, parts.preparing.encoder)
        distributed.wait()  # all processes have read before one writes
        if distributed.first:
            _claim(out, semantic, fresh)
        distributed.wait()
        start = resumed[1].step if resumed else 0
        shown = Prompt(recipe.prompt, await parts.pictures.of(training.examples[0]))
        # Before weights are rounded or split: in float32, and in any one process.
        packing = check_packing(parts.policy, _prepare(parts, recipe.rollout.max_tokens)(shown), recipe.model)
        place_policy(recipe, parts)
        sampler = await build_sampler(recipe, parts, out, shown)
        run = _assemble(recipe, out, mark, training, held_out, parts, sampler, rewards, grader, start, say)
        run.reward_reader = None if rewarding is None else asdict(rewarding)
        if resumed:
            if parts.state is not None:
                load_optimizer(parts.state, parts.policy, run.updater.optimizer)
            else:
                restore_optimizer(parts.policy, run.updater.optimizer, older_optimizer_state(resumed[0]))
            run.step, run.alarms = resumed[1].step, dict(resumed[1].figures.get("alarms", {}))
            run.model_step = run.step if is_model_folder(resumed[0]) else 0
            say(f"going on from {resumed[0]}")
        if recipe.preflight:
            say(packing.line())
        await _preflight(run)
        try:
            with interrupts(partial(_stop, run)):
                last = await train(run)
            if run.step < recipe.steps:
                say(f"stopped after step {run.step} of {recipe.steps}; run the same command to go on")
            if run.best is not None:
                say(f"best checkpoint: {run.best.line()}")
            say(f"checkpoint: {last if run.step else 'none yet'}")
            return last
        finally:
            run.log.close()
    except EngineDead as error:
        raise RunFailed(f"{error}; started again, the run resumes from its newest checkpoint") from error
    finally:
        parts.pictures.close()
        if sampler is not None:
            await sampler.aclose()
        await rewards.aclose()
        if grader is not None:
            await grader.engine.aclose()


def _trained_on(recipe: Recipe) -> str:
    """What the training data's fingerprint is of."""
    if recipe.data.captions is not None:
        return "captions"
    return "images" if recipe.data.questions is None else "questions"


def _scorers(recipe: Recipe) -> dict[str, Any]:
    """Settings that determine the scores of image rewards, by kind; empty without any."""
    scored = (ClipRewardConfig, BlipRewardConfig, ItmRewardConfig)
    scorers = {
        reward.kind: scorer_identity(ScorerConfig(reward.kind, reward.model, reward.dtype))
        for reward in recipe.rewards
        if isinstance(reward, scored)
    }
    return {"scorers": scorers} if scorers else {}


def _stop(run: TrainingRun) -> None:
    run.stopping = True
    if run.parts.distributed.first:  # a signal may arrive while a line is being written
        say_at_once("stopping: this step is finished, then a checkpoint written; a second signal ends it at once")


def _quiet(line: str) -> None:
    """Discard a line: only the first process logs."""


def _read(recipe: Recipe) -> list[str]:
    """Inputs that the output must not overwrite: data, and a model that an earlier run may have written there."""
    shards = [recipe.data.shards, *([] if recipe.validation is None else [recipe.validation.shards])]
    questions = [
        recipe.data.questions,
        recipe.data.captions,
        None if recipe.validation is None else recipe.validation.questions,
    ]
    local = [recipe.model] if Path(recipe.model).is_dir() else []
    places = [url for pattern in shards for url in read_places(pattern, expand(pattern))]
    return [*places, *(path for path in questions if path is not None), *local]


def load_data(recipe: Recipe) -> tuple[ExampleList, ExampleList | None]:
    """Training and validation data. Raises BadInput if an image is in both."""
    data = recipe.data
    if data.captions is not None:
        training = load_captioned(data.shards, data.captions, data.prompt_name, data.fingerprint)
    else:
        asked = None if data.questions is None else question_artifact(data.questions).url
        training = load_examples(data.shards, asked, data.fingerprint)
    if recipe.validation is None:
        return training, None
    held_out = load_examples(recipe.validation.shards, question_artifact(recipe.validation.questions).url)
    known = {example.uid for example in training.examples}
    shared = next((example.key for example in held_out.examples if example.uid in known), None)
    if shared is not None:
        raise BadInput(f"{recipe.validation.shards}: {shared!r} is trained on, too; validate on other images")
    return training, held_out


def _look(out: Path, semantic: dict[str, Any], fresh: bool) -> tuple[Path, Facts] | None:
    """The checkpoint in ``out`` to resume from, None to start. Changes nothing.

    Raises ArtifactMismatch if another recipe was used there, BadInput if it is not a training run's folder.
    """
    file = out / RUN
    if not file.exists():
        if out.exists() and {*out.iterdir()} > {*unfinished(file)}:
            raise BadInput(f"{out}: the folder holds something that is no training run; choose another --out")
        return None
    if fresh:
        return None
    try:
        before = bounded_json.load(file)
        if not isinstance(before, dict):
            raise TypeError(f"a {type(before).__name__}, not an object")
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactMismatch(f"{file}: unreadable ({error}); restore it, or use --fresh to start over") from None
    if before != semantic:
        named = "; ".join(differences(before, semantic)[:3])
        raise ArtifactMismatch(f"{out}: another run is there ({named}); use another --out, or --fresh to start over")
    return newest(out, fingerprint(semantic))


def _claim(out: Path, semantic: dict[str, Any], fresh: bool) -> None:
    """Make ``out`` this run's folder; with ``fresh``, checkpoints of an earlier run are removed."""
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for path in [*out.glob(f"{MARK}*"), *out.glob(BEST), *out.glob(f"*{FAILURE}")]:
            remove(path)
    write_new(out / RUN, json.dumps(semantic, indent=1, sort_keys=True).encode())


def _assemble(
    recipe: Recipe,
    out: Path,
    mark: str,
    training: ExampleList,
    held_out: ExampleList | None,
    parts: PolicyParts,
    sampler: Sampler,
    rewards: RewardManager,
    grader: QuizReader | None,
    start: int,
    say: Say,
) -> TrainingRun:
    rollout, algorithm = recipe.rollout, recipe.algorithm
    sampling = RolloutSampling(
        recipe.prompt,
        rollout.group,
        rollout.max_tokens,
        rollout.temperature,
        recipe.seed,
        logprobs=rollout.reports_logprobs,
    )
    config = UpdateConfig(
        loss=algorithm.loss,
        baseline=algorithm.baseline,
        critic=CriticConfig(**algorithm.critic.model_dump(exclude={"hidden", "rate"})) if algorithm.critic else None,
        epochs=algorithm.epochs,
        minibatches=algorithm.minibatches,
        clip=ClipRange(algorithm.clip_low, algorithm.clip_high, algorithm.cap),
        kl=algorithm.kl,
        kl_in=algorithm.kl_in,
        estimator=algorithm.estimator,
        correction=recipe.correction(),
        entropy=algorithm.entropy,
        limit=rollout.max_tokens,
        budget=recipe.budget,
        max_norm=recipe.optimizer.max_norm,
        mask_truncated=algorithm.mask_truncated,
    )
    optimizer = build_optimizer(parts.policy, recipe.optimizer, algorithm.critic.rate if algorithm.critic else 1.0)
    updater = Updater(parts.policy, optimizer, config, parts.reference, parts.distributed)
    validated = held_out.examples[: recipe.validation.images] if held_out and recipe.validation else ()
    sinks = _sinks(recipe, out) if parts.distributed.first else []
    log = RunLog(out, start, sinks, parts.distributed.rank)
    words = {"images": ("images", "left out")}.get(kind := _trained_on(recipe), (f"images with {kind}", "without"))
    prepare = _prepare(parts, rollout.max_tokens, sampler.engine)
    given = None
    if recipe.data.captions is not None:
        thinking = parts.preparing.encoder.thinking
        if thinking is not None and thinking.begun:
            raise BadInput(
                f"{recipe.model}: its chat template begins a thought, which given captions do not have; switch it off "
                "by template_args, e.g. {enable_thinking: false}"
            )
        given = Demonstrations(prepare, parts.pictures, recipe.prompt, parts.preparing.caption_ids, rollout.max_tokens)
    examples = training.examples[: recipe.data.images]
    cut = f" (the first {len(examples)} are used)" if len(examples) < len(training.examples) else ""
    say(f"{len(training.examples)} {words[0]}{cut}, {training.without} {words[1]}; {len(validated)} to validate on")
    return TrainingRun(
        recipe=recipe,
        out=out,
        fingerprint=mark,
        examples=examples,
        held_out=validated,
        parts=parts,
        sampler=sampler,
        rollouts=Rollouts(sampler.engine, prepare, parts.pictures, sampling),
        rewards=rewards,
        validation_reader=grader,
        updater=updater,
        log=log,
        say=say,
        demonstrations=given,
        checkpoints=CheckpointWriter(out, parts.distributed),
    )


def _prepare(parts: PolicyParts, max_tokens: int, engine: Engine | None = None) -> Callable[[Prompt], PreparedPrompt]:
    """Prepare prompts for the policy; refuses one that leaves no room for a full caption: neither is truncated."""
    room = parts.preparing.max_model_len

    def prepare(prompt: Prompt) -> PreparedPrompt:
        try:  # an engine in this process has just done so
            known = engine.prepared(prompt) if isinstance(engine, TransformersEngine) else None
            prepared = known or parts.preparing.prepare(prompt)
        except RequestError as error:
            raise BadInput(f"{error}; change the recipe's prompt") from None
        if len(prepared.ids) + max_tokens > room:
            raise BadInput(
                f"rollout.max_tokens: {max_tokens} tokens after a prompt of {len(prepared.ids)} are more than the "
                f"{room} that the model takes; lower it"
            )
        return prepared

    return prepare


def _sinks(recipe: Recipe, out: Path) -> list[Sink]:
    sinks: list[Sink] = [TensorBoard(out / "tensorboard")]
    if recipe.wandb is not None:
        sinks.append(WandB(recipe.wandb, out.resolve().name, out, redacted_data(recipe.model_dump(mode="json"))))
    return sinks


async def _preflight(run: TrainingRun) -> None:
    if not run.recipe.preflight or run.step:
        return
    reward = run.rewards.rewards.get("quiz")
    if isinstance(reward, QuizReward):
        scores = await floors(reward, run.examples)
        run.say(f"preflight: generic {scores.generic:.3f}, empty {scores.empty:.3f}, blind {scores.blind:.3f}")
        refuse_templates(scores)
        able = await ability(reward.reader, run.examples)
        run.say(f"preflight: {able.line()}")
        for warning in refuse_reader(able, reward.config.reader):
            run.say(warning)
    if run.validation_reader is not None and run.held_out:
        held = await ability_of(run.validation_reader, run.held_out[:IMAGES])
        for caution in cautions(held) if held else ():
            run.say(f"warning: validation: {caution.text}")
    if len(run.rewards.rewards) > isinstance(reward, QuizReward):
        control = await controls(run.rewards, run.examples, run.parts.preparing.encoder.text_ids)
        for line in control.lines():
            run.say(line)
        run.template_rewards = control.generic
