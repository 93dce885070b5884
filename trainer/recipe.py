"""The recipe of a training run: every setting, typed and documented; unknown keys are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from ..errors import BadInput
from ..manifests.configuration import Growing
from ..manifests.files.redaction import identity_of
from ..manifests.import_path import is_import_path, source_digest
from ..models.tiny.world.prompts import DENSE
from .advantages import Baseline
from .losses import LOSSES, KLEstimator, find_loss
from .policy.lora import LoRAConfig
from .recipe_file import find_recipe, first_problem, read_recipe
from .rewards.kinds import RewardEntry
from .rewards.quiz import QuizRewardConfig

LARGE = 2 << 30  # bytes of a model's files, from which on not every checkpoint has them


class Section(Growing):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Images, and for a quiz the questions about them."""

    shards: str = Field(description="folder, glob or URL of image shards")
    questions: str | None = Field(
        None, description="artifact of questions, or the folder of a `capipe qa`; without a quiz none are needed"
    )
    fingerprint: str | None = Field(
        None, description="of the questions, or without them of the images, where it must be this one"
    )
    images: int | None = Field(None, ge=1, description="use the first so many images; all by default")


class RolloutConfig(Section):
    """Sampling of captions."""

    images: int = Field(16, ge=1, description="images per step, over all processes")
    group: int = Field(8, ge=2, description="captions per image")
    max_tokens: int = Field(256, ge=1, description="longest caption")
    temperature: float = Field(1.0, gt=0)
    decoders: int = Field(1, ge=1, description="image decoding processes")
    engine: str = Field(
        "transformers",
        pattern=r"^(transformers|vllm|https?://\S+(,\s*https?://\S+)*)$",
        description="the rollout engine: transformers, vllm, or URLs of vLLM servers, separated by commas",
    )
    overlap: bool = Field(
        False, description="sample the next step's captions during the update by this one's, a step off-policy"
    )
    gpu_memory: float = Field(0.4, gt=0, le=1, description="vllm: its share of the GPU, which the policy needs as well")
    sleep: bool = Field(False, description="vllm: it gives its GPU memory back while the policy learns")
    sync_folder: str | None = Field(
        None, description="vllm and servers: where they read new weights; in --out by default"
    )
    probe: float | None = Field(
        None, gt=0, description="how far a synced engine's log-probabilities may be off; 0.001 on CPUs, 0.1 on GPUs"
    )

    @model_validator(mode="after")
    def _sampled_soundly(self) -> RolloutConfig:
        if self.overlap and self.temperature != 1:
            raise ValueError("overlap takes the log-probabilities of sampling, which engines report for temperature 1")
        if self.sleep and (self.engine != "vllm" or self.overlap):
            raise ValueError("sleep is for engine vllm, and an engine cannot sleep that is to overlap")
        return self


def _known_loss(name: str) -> str:
    find_loss(name)
    return name


class AlgorithmConfig(Section):
    """Advantages and loss (docs/architecture.md, trainer)."""

    loss: Annotated[str, AfterValidator(_known_loss)] = Field(
        "grpo", description=f"{', '.join(LOSSES)}, or the import path of another: package.module:name"
    )
    baseline: Baseline = Field("group_std", description="the baseline of a caption's reward, without a critic")
    critic: CriticSection | None = None
    epochs: int = Field(1, ge=1, description="times that an update goes over a step's captions")
    minibatches: int = Field(1, ge=1, description="optimiser steps that each time is cut into")
    clip_low: float = Field(0.2, ge=0, lt=1)
    clip_high: float = Field(0.2, ge=0)
    cap: float = Field(5.0, gt=0, description="cispo: largest weight of a token")
    kl: float = Field(
        0.0, ge=0, description="weight of the divergence from the model trained from; 0 loads no reference"
    )
    estimator: KLEstimator = Field(
        "k3", description="k2 pulls as KL(policy, start) does, k3 as KL(start, policy); k1 on average not at all"
    )
    entropy: float = Field(0.0, description="weight of an entropy bonus")
    mask_truncated: bool = Field(False, description="captions cut at the limit neither reward nor punish")


class CriticSection(Section):
    """A value head on the policy's last hidden states gives the advantages (PPO, A2C), instead of the group."""

    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1, description="lambda of GAE; 1: returns minus values")
    weight: float = Field(0.5, gt=0, description="of the value loss")
    rate: float = Field(
        1.0, gt=0, description="times the optimizer's learning rate, for the head: it starts from nothing, at 0"
    )
    clip: float | None = Field(None, gt=0, description="how far a value may move in an update")
    whiten: bool = Field(True, description="give a step's advantages mean 0 and standard deviation 1")
    hidden: int | None = Field(
        None, ge=1, description="a head of two layers, the first so wide after a LayerNorm; a linear one by default"
    )
    detach: bool = Field(False, description="the value loss changes the head alone, not the policy under it")


class TrainedConfig(Section):
    """Which parts learn. CapRL's paper does not say; the default is the language model alone."""

    vision: bool = False
    projector: bool = False
    llm: bool = Field(True, description="all of its weights, or with `lora` the adapter in their place")
    lora: LoRAConfig | None = None


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0)
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")


class ValidationConfig(Section):
    """Greedy captions of held-out images, graded by a reader that is not the reward's, whatever it is called."""

    later = ("template_args", "mode")

    shards: str
    questions: str
    reader: str = "tiny/holdout-reader"
    engine: str = "auto"
    mode: Literal["choose", "sampled"] = Field("choose", description="as a quiz's, of this reader")
    every: int = Field(25, ge=1, description="steps")
    images: int = Field(64, ge=1, description="the first so many")
    template_args: dict[str, Any] = Field({}, description="as a quiz's, of this reader")


class AlarmConfig(Section):
    """Where a run is stopped: shares of a step's captions, and the divergence from the start."""

    truncated: float = Field(0.6, gt=0, le=1, description="captions cut at their limit")
    repeating: float = Field(0.5, gt=0, le=1, description="captions that loop")
    kl: float = Field(50.0, gt=0, description="mean per caption, where a reference is loaded")
    unscored: float = Field(0.5, gt=0, le=1, description="captions without a score")
    mismatch: float = Field(
        0.3, gt=0, description="mean distance per token, in nats, of the policy from the rollout engine"
    )
    patience: int = Field(3, ge=1, description="steps in a row before an alarm ends the run")


class Recipe(Section):
    """All settings of a run."""

    later = ("template_args", "max_pixels", "min_pixels", "model_files")

    model: str = Field(description="where training starts: a bundled model, a folder or a hub id")
    prompt: str = Field(DENSE[0], description="empty for models that read none, or nothing but the image")
    template_args: dict[str, Any] = Field(
        {}, description="given to the model's chat template besides the chat, e.g. {enable_thinking: false}"
    )
    max_pixels: int | None = Field(
        None, ge=1, description="largest image area the model sees, and so image tokens; its processor's by default"
    )
    min_pixels: int | None = Field(None, ge=1, description="smallest image area; its processor's by default")
    data: DataConfig
    rewards: tuple[RewardEntry, ...] = Field(min_length=1)
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    trained: TrainedConfig = TrainedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig | None = None
    alarms: AlarmConfig = AlarmConfig()
    steps: int = Field(100, ge=1)
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    model_files: Literal["auto", "every", "last"] = Field(
        "auto",
        description="checkpoints that are Hugging Face folders, which engines load: every one, or the last and the "
        "best; auto: every one of models up to 2 GiB",
    )
    budget: int = Field(16384, ge=1, description="packed tokens in one forward pass")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of computation, weights are float32; auto: bfloat16 (autocast) on CUDA, float32 on a CPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    gradient_checkpointing: bool = False
    parallel: Literal["replicated", "sharded"] = Field(
        "replicated",
        description="under torchrun: weights whole in every process (DDP), or split over those of a node (FSDP2) and "
        "replicated between nodes",
    )
    preflight: bool = Field(
        True,
        description="refuse to train where a quiz rewards a caption of any image, or its reader cannot read; log what "
        "other rewards give such captions",
    )
    wandb: str | None = Field(None, min_length=1, description="Weights & Biases project that metrics go to as well")
    seed: int = 0

    @model_validator(mode="after")
    def _sound(self) -> Recipe:
        kinds = [reward.kind for reward in self.rewards]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"a kind of reward is listed twice: {', '.join(kinds)}")
        if not (self.trained.vision or self.trained.projector or self.trained.llm or self.trained.lora):
            raise ValueError("no part of the model is trained")
        self._sound_adapter()
        if self.algorithm.loss in ("ppo", "a2c") and self.algorithm.critic is None:
            raise ValueError(f"{self.algorithm.loss} takes its advantages from a value head: add `critic: {{}}`")
        if self.algorithm.loss == "a2c" and self.algorithm.epochs * self.algorithm.minibatches > 1:
            raise ValueError(
                "a2c makes one step of captions that the policy itself sampled: epochs and minibatches are 1"
            )
        if self.algorithm.kl and self.algorithm.estimator == "k1":
            raise ValueError("estimator k1 has no gradient on average, so kl would do nothing: take k2 or k3")
        quiz = next((reward for reward in self.rewards if isinstance(reward, QuizRewardConfig)), None)
        if quiz is not None and self.data.questions is None:
            raise ValueError("a quiz asks questions: add data.questions, the folder of a `capipe qa`")
        # Compared by name: a recipe knows no more. Two names of the same model are detected when the run starts.
        if quiz is not None and self.validation is not None and quiz.reader == self.validation.reader != "":
            raise ValueError("the validation's reader is the reward's: it must be one that was never a reward")
        return self

    def _sound_adapter(self) -> None:
        trained = self.trained
        if trained.lora is None:
            return
        if trained.vision or trained.projector or not trained.llm:
            raise ValueError("trained.lora is an adapter of the language model and learns alone: leave the rest out")
        if self.parallel == "sharded":
            raise ValueError("trained.lora: an adapter is too small to be split; set parallel: replicated")

    def every_is_model(self, size: int) -> bool:
        """Whether every checkpoint of a model of ``size`` bytes is a Hugging Face folder."""
        return self.model_files == "every" or (self.model_files == "auto" and size <= LARGE)

    def semantic(self) -> dict[str, Any]:
        """Settings that determine the weights, with the code of imported rewards and losses; not location or speed."""
        fast: Any = {"budget", "device", "gradient_checkpointing", "model_files", "parallel", "save_every", "wandb"}
        if self.rollout.overlap:
            fast -= {"save_every"}  # no rollout overlaps a checkpoint, so its interval matters
        rollout = {"decoders", "engine", "gpu_memory", "sleep", "sync_folder", "probe"}
        rewards = {"__all__": {"batch", "cache", "device"}}
        left_out: Any = {**dict.fromkeys(fast, True), "rollout": rollout, "rewards": rewards, "alarms": {"mismatch"}}
        semantic: dict[str, Any] = identity_of(self.model_dump(mode="json", exclude=left_out))
        names = (self.algorithm.loss, *(reward.kind for reward in self.rewards))
        code = {name: source_digest(name) for name in names if is_import_path(name)}
        return semantic | ({"code": code} if code else {})


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from a YAML file, or a bundled one by name, with ``section.key=value`` overrides.

    Raises BadInput with the key and the reason.
    """
    loaded = read_recipe(path, overrides, "training")
    try:
        return Recipe.model_validate(loaded)
    except ValidationError as error:
        raise BadInput(f"{find_recipe(path)}: {first_problem(error)}") from None
