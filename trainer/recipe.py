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
from .losses import LOSSES, Correction, CorrectionMode, KLEstimator, find_loss
from .policy.lora import LoRAConfig
from .recipe_file import find_recipe, first_problem, read_recipe
from .rewards.kinds import RewardEntry
from .rewards.quiz import QuizRewardConfig


class Section(Growing):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Images, for a quiz the questions about them, and for sft the captions to imitate."""

    later = ("captions", "prompt_name")

    shards: str = Field(description="folder, glob or URL of image shards")
    questions: str | None = Field(
        None, description="artifact of questions, or the folder of a `capipe qa`; without a quiz none are needed"
    )
    captions: str | None = Field(None, description="sft: artifact of captions of a `capipe annotate`")
    prompt_name: str | None = Field(
        None, description="sft: the prompt whose captions are imitated, all its samples; needed if there are several"
    )
    fingerprint: str | None = Field(
        None, description="of the questions or captions, or without them of the images, where it must be this one"
    )
    images: int | None = Field(None, ge=1, description="use the first so many images; all by default")


class RolloutConfig(Section):
    """Sampling of captions."""

    later = ("refill",)

    images: int = Field(16, ge=1, description="images per step, over all processes")
    group: int = Field(8, ge=1, description="captions per image; 1 with a critic")
    refill: int = Field(
        0,
        ge=0,
        description="rounds in which groups whose scores are all equal are replaced by groups of further images, as "
        "in DAPO; 0 for none",
    )
    max_tokens: int = Field(256, ge=1, description="longest caption")
    temperature: float = Field(1.0, gt=0)
    decoders: int = Field(1, ge=1, description="image decoding processes")
    processes: int | None = Field(
        None,
        ge=0,
        description="transformers on a CPU: processes that sample captions; one for each of torch's threads, by "
        "default, or half as many with overlap; 0 for none but the training process",
    )
    engine: str = Field(
        "transformers",
        pattern=r"^(transformers|vllm|https?://\S+(,\s*https?://\S+)*)$",
        description="the rollout engine: transformers, vllm, or URLs of vLLM servers, separated by commas",
    )
    overlap: bool = Field(
        False,
        description="sample the next step's captions during the update by this one's, a step off-policy (corrected)",
    )
    gpu_memory: float = Field(0.4, gt=0, le=1, description="vllm: its share of the GPU, which the policy needs as well")
    sleep: bool = Field(
        False, description="vllm: it drops weights and cache while the policy learns, and gets all weights anew"
    )
    sync: Literal["folder", "direct"] = Field(
        "folder",
        description="how vllm and servers get new weights: through files, or from GPU to GPU by vLLM's weight transfer",
    )
    sync_folder: str | None = Field(
        None, description="vllm and servers: where they read new weights; in --out by default"
    )
    probe: float | None = Field(
        None,
        gt=0,
        description="how far a synced engine's log-probabilities may be off; 0.001 where engine and policy compute in "
        "float32, 0.1 where one does not, 0.2 where the engine's head does not",
    )

    @property
    def reports_logprobs(self) -> bool:
        """Whether the engine reports log-probabilities of the distribution that captions are sampled from."""
        return self.engine == "transformers" or self.temperature == 1

    @model_validator(mode="after")
    def _sampled_soundly(self) -> RolloutConfig:
        if self.sleep and (self.engine != "vllm" or self.overlap):
            raise ValueError("sleep is for engine vllm, and an engine cannot sleep that is to overlap")
        if self.sync == "direct" and (self.engine == "transformers" or self.sync_folder is not None):
            raise ValueError("sync: direct is for engine vllm and servers, and uses no sync_folder")
        return self


def _known_loss(name: str) -> str:
    find_loss(name)
    return name


class AlgorithmConfig(Section):
    """Advantages and loss (docs/architecture.md, trainer)."""

    later = ("kl_in", "correction", "correction_cap")

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
    kl_in: Literal["loss", "reward"] = Field(
        "loss",
        description="a loss of each token, or a penalty in the reward: kl (log p - log q) of each token before the "
        "critic's advantages (PPO as of 2019 to 2024), or summed over a caption before the baseline",
    )
    estimator: KLEstimator = Field(
        "k3",
        description="of the loss: k2 pulls as KL(policy, start) does, k3 as KL(start, policy); k1 on average not "
        "at all. Logs and alarms take k3",
    )
    correction: Literal["auto", "none"] | CorrectionMode = Field(
        "auto",
        description="importance weights for captions that vllm, a server or older weights (overlap) sampled, by token "
        "or by caption (sequence), truncated at correction_cap or masked above it; auto: sequence_mask wherever one "
        "of these samples",
    )
    correction_cap: float = Field(3.0, gt=0, description="largest importance weight")
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

    later = ("template_args", "max_pixels", "min_pixels")

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
    rewards: tuple[RewardEntry, ...] = Field((), description="at least one, but none for sft")
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    trained: TrainedConfig = TrainedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig | None = None
    alarms: AlarmConfig = AlarmConfig()
    steps: int = Field(100, ge=1)
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    budget: int = Field(16384, ge=1, description="packed tokens in one forward pass")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of computation, weights are float32; auto: bfloat16 (autocast) on CUDA, float32 on a CPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    gradient_checkpointing: bool = False
    parallel: Literal["replicated", "sharded"] = Field(
        "replicated", description="under torchrun: weights whole in every process (DDP), or split over them (FSDP2)"
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
        self._sound_captions()
        if self.algorithm.loss in ("ppo", "a2c") and self.algorithm.critic is None:
            raise ValueError(f"{self.algorithm.loss} takes its advantages from a value head: add `critic: {{}}`")
        if self.algorithm.loss == "a2c" and self.algorithm.epochs * self.algorithm.minibatches > 1:
            raise ValueError(
                "a2c makes one step of captions that the policy itself sampled: epochs and minibatches are 1"
            )
        self._sound_group()
        self._sound_divergence()
        self._sound_correction()
        quiz = next((reward for reward in self.rewards if isinstance(reward, QuizRewardConfig)), None)
        if quiz is not None and self.data.questions is None:
            raise ValueError("a quiz asks questions: add data.questions, the folder of a `capipe qa`")
        # Compared by name: a recipe knows no more. Two names of the same model are detected when the run starts.
        if quiz is not None and self.validation is not None and quiz.reader == self.validation.reader != "":
            raise ValueError("the validation's reader is the reward's: it must be one that was never a reward")
        return self

    def _sound_divergence(self) -> None:
        algorithm = self.algorithm
        if algorithm.kl and algorithm.kl_in == "loss" and algorithm.estimator == "k1":
            raise ValueError("estimator k1 has no gradient on average, so kl would do nothing: take k2 or k3")
        if algorithm.kl_in == "reward" and "estimator" in algorithm.model_fields_set and algorithm.estimator != "k1":
            raise ValueError("kl_in reward takes log p - log q of each token (k1): leave algorithm.estimator out")

    def correction(self) -> Correction | None:
        """The correction for captions that something else than the policy's own modules sampled."""
        mode = self.algorithm.correction
        own = self.rollout.engine == "transformers" and not self.rollout.overlap
        if mode == "none" or (mode == "auto" and (own or find_loss(self.algorithm.loss).captions != "sampled")):
            return None
        return Correction("sequence_mask" if mode == "auto" else mode, self.algorithm.correction_cap)

    def _sound_correction(self) -> None:
        rollout, corrected = self.rollout, self.correction() is not None
        if self.algorithm.loss == "a2c" and rollout.overlap and not corrected:
            raise ValueError(
                "a2c takes captions as the policy's own, and with rollout.overlap they are of older weights: set "
                "algorithm.correction to auto, or overlap to false"
            )
        if (corrected or rollout.overlap) and not rollout.reports_logprobs:
            raise ValueError(
                f"captions of {rollout.engine} are weighted by the log-probabilities of their sampling, which it "
                f"reports for temperature 1, not for {rollout.temperature:g}: set rollout.temperature to 1 or "
                "rollout.engine to transformers" + ("" if rollout.overlap else ", or algorithm.correction to none")
            )

    def _sound_group(self) -> None:
        if self.rollout.group > 1:
            return
        if self.algorithm.critic is None:
            raise ValueError(
                "rollout.group: a single caption has no others to be compared with; take 2 or more, or add a critic"
            )
        if any(reward.normalise for reward in self.rewards):
            raise ValueError(
                "rollout.group: `normalise` is within an image's captions, and 1 would always be 0: leave it out"
            )

    def _sound_adapter(self) -> None:
        trained = self.trained
        if trained.lora is None:
            return
        if trained.vision or trained.projector or not trained.llm:
            raise ValueError("trained.lora is an adapter of the language model and learns alone: leave the rest out")
        if self.parallel == "sharded":
            raise ValueError("trained.lora: an adapter is too small to be split; set parallel: replicated")

    def _sound_captions(self) -> None:
        """What goes with a loss on sampled captions, on the best ones, or on given ones."""
        loss, algorithm = find_loss(self.algorithm.loss), self.algorithm
        name = algorithm.loss
        if loss.captions != "sampled" and algorithm.critic is not None:
            raise ValueError(f"{name} imitates captions, for which a critic has no use: leave algorithm.critic out")
        if loss.captions != "sampled" and algorithm.correction not in ("auto", "none"):
            raise ValueError(f"{name} imitates captions whoever sampled them: leave algorithm.correction out")
        if loss.captions != "sampled" and algorithm.kl and algorithm.kl_in == "reward":
            raise ValueError(f"{name} imitates captions, which a penalty in the reward would choose: set kl_in to loss")
        if self.rollout.refill and algorithm.critic is not None:
            raise ValueError("rollout.refill: with a critic a group of equal scores has a gradient; set it to 0")
        if loss.captions != "given":
            if not self.rewards:
                raise ValueError(f"rewards: {name} needs at least one reward to score captions by")
            if self.data.captions is not None or self.data.prompt_name is not None:
                raise ValueError(f"data.captions are for loss sft, {name} samples its own: leave them out")
            return
        if self.data.captions is None:
            raise ValueError(f"{name} imitates captions: add data.captions, the folder of a `capipe annotate`")
        unused = {
            "rewards": bool(self.rewards),
            "data.questions": self.data.questions is not None,
            "rollout.refill": self.rollout.refill > 0,
            "rollout.overlap": self.rollout.overlap,
            "rollout.temperature": self.rollout.temperature != 1,
            "algorithm.kl": algorithm.kl > 0,
        }
        if wrong := next((key for key, is_set in unused.items() if is_set), None):
            raise ValueError(f"{name} samples and scores nothing: leave {wrong} out")

    def semantic(self) -> dict[str, Any]:
        """Settings that determine the weights, with the code of imported rewards and losses; not location or speed."""
        fast: Any = {"budget", "device", "gradient_checkpointing", "parallel", "save_every", "wandb"}
        if self.rollout.overlap:
            fast -= {"save_every"}  # no rollout overlaps a checkpoint, so its interval matters
        rollout = {"decoders", "processes", "engine", "gpu_memory", "sleep", "sync", "sync_folder", "probe"}
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
