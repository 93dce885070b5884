"""The recipe of a training run: every setting, typed and documented; unknown keys are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ..errors import BadInput
from ..manifests.files.redaction import identity_of
from ..manifests.import_path import is_import_path, source_digest
from ..models.tiny.world.prompts import DENSE
from .losses import Correction, find_loss
from .recipe_file import find_recipe, first_problem, read_recipe
from .recipe_sections import (
    AlarmConfig,
    AlgorithmConfig,
    DataConfig,
    OptimizerConfig,
    RolloutConfig,
    Section,
    TrainedConfig,
    ValidationConfig,
)
from .rewards.kinds import RewardEntry
from .rewards.quiz import QuizRewardConfig

LARGE = 2 << 30  # bytes of a model's files, from which on not every checkpoint has them


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
    rewards: tuple[RewardEntry, ...] = Field((), description="at least one, but none for sft")
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

    def every_is_model(self, size: int) -> bool:
        """Whether every checkpoint of a model of ``size`` bytes is a Hugging Face folder."""
        return self.model_files == "every" or (self.model_files == "auto" and size <= LARGE)

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
        fast: Any = {"budget", "device", "gradient_checkpointing", "model_files", "parallel", "save_every", "wandb"}
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
