"""Sections of a training recipe: settings of data, rollouts, algorithm, optimizer, validation and alarms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from ..manifests.configuration import Growing
from .advantages import Baseline
from .losses import LOSSES, CorrectionMode, KLEstimator, find_loss
from .policy.lora import LoRAConfig


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
