"""Builds the parts of a run from its recipe: policy, optimizer, learning rate, model files of a checkpoint."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import BadInput
from ..models.engines.captioner_registry import check_prompt
from ..models.engines.context import image_tokens, text_room
from ..models.engines.hf.batched_lm import BatchedLM
from ..models.engines.hf.captioner_adapter import barred_ids, is_blip2, is_captioner, language_model
from ..models.engines.hf.engine import batched_lm, load_model
from ..models.engines.model_folder import image_grid, resolve_model
from ..models.images.grid import ImageGrid
from .distributed import ALONE, Distributed
from .images import Pictures
from .policy.batch import Batch
from .policy.blip2 import Blip2Policy
from .policy.captioner import parts_of as captioner_parts
from .policy.critic import ValueHead
from .policy.decoder import DecoderPolicy
from .policy.encoder_decoder import EncoderDecoderPolicy
from .policy.fsdp import shard, whole
from .policy.lora import (
    FOLDER,
    LoRAConfig,
    adapter_off,
    has_adapter,
    insert_adapter,
    load_adapter,
    merged_weights,
    need_peft,
    save_adapter,
)
from .policy.packing_check import refuse_unknown_layers
from .recipe import OptimizerConfig, Recipe, TrainedConfig

VALUE_HEAD = "critic/value_head.safetensors"  # in a subfolder: beside the weights, vLLM would load it as one of them
READERS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*processor_config.json",
)


@dataclass
class PolicyParts:
    """The model in training and its dependents. ``preparing``: not shared with the engine's thread.

    ``sampled``: the whole model that captions are sampled from: the policy's own, or a copy if the policy is sharded or
    updated while captions are sampled. ``folder``: the folder it was loaded from.
    """

    policy: DecoderPolicy
    sampled: Any
    grid: ImageGrid
    preparing: BatchedLM
    pictures: Pictures
    reference: Callable[[Any], Tensor] | None
    folder: Path
    distributed: Distributed
    learning: str  # which parts are trained, in words


def build_policy(recipe: Recipe, weights: Path | None = None, distributed: Distributed = ALONE) -> PolicyParts:
    """Load ``recipe.model``, or its checkpoint ``weights``, and freeze the parts that are not trained.

    Raises BadInput for models and prompts that the trainer does not support.
    """
    start = resolve_model(recipe.model)
    folder = weights or start
    grid = image_grid(folder, recipe.min_pixels, recipe.max_pixels)
    if grid is None:
        raise BadInput(f"{recipe.model}: reads text only; training captions takes a vision-language model")
    refuse_large_images(recipe, grid)
    check_prompt(recipe.model, start, recipe.prompt)
    lora = recipe.trained.lora
    if lora is not None:
        need_peft()
    of_model = folder if lora is None else start  # an adapter does not change the base weights
    model: Any = load_model(str(of_model), sees=True, called=recipe.model, dtype="float32", device=recipe.device)
    dtype = computed_in(recipe.dtype, model.device)
    banned, kind = barred_ids(model), policy_class(model, recipe)
    policy_of = partial(kind, banned=banned, temperature=recipe.rollout.temperature, dtype=dtype)
    reference = None
    if recipe.algorithm.kl and lora is None:
        frozen = (
            copy.deepcopy(model)
            if weights is None
            else load_model(str(start), sees=True, dtype="float32", device=recipe.device)
        )
        reference = _scorer(policy_of(frozen.requires_grad_(False)))
    learning = freeze(model, recipe.trained)
    if lora is not None:
        learning += f", {adapt(model, recipe, lora, weights)}"
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = policy_of(model, value_head=value_head(recipe, model, weights))
    if recipe.algorithm.kl and lora is not None:
        reference = _scorer(policy, without_adapter=True)
    apart = distributed.sharded or (recipe.rollout.overlap and recipe.rollout.engine == "transformers")
    sampled = copy.deepcopy(model).requires_grad_(False) if apart else model
    if distributed.sharded:
        shard(policy)
    preparing = batched_lm(sampled, str(folder), grid, template_args=recipe.template_args)
    pictures = Pictures(grid, recipe.rollout.decoders, lossless="://" in recipe.rollout.engine)
    return PolicyParts(policy, sampled, grid, preparing, pictures, reference, folder, distributed, learning)


def whole_policy(parts: PolicyParts) -> DecoderPolicy:
    """The policy; if it is sharded, a policy of the unsharded copy, which a single process can use."""
    policy = parts.policy
    if not parts.distributed.sharded:
        return policy
    banned = policy.get_buffer("banned").tolist()
    return type(policy)(parts.sampled, banned=banned, temperature=policy.temperature, dtype=policy.dtype)


def refuse_large_images(recipe: Recipe, grid: ImageGrid) -> None:
    """Raise BadInput if the largest image with one caption exceeds ``budget``, the packed tokens of a micro-batch.

    A group's captions are packed after one copy of their image; a whole group may exceed ``budget``, one caption may
    not.
    """
    image, limit = image_tokens(grid), recipe.rollout.max_tokens
    prompt = text_room([recipe.prompt], 0)
    tokens = image + prompt + limit
    if tokens > recipe.budget:
        room = (recipe.budget - prompt - limit) * grid.factor**2
        fix = f"set max_pixels to {room} or less" if room >= grid.factor**2 else "lower rollout.max_tokens"
        raise BadInput(
            f"max_pixels: an image of {grid.max_pixels} pixels is {image} tokens; with up to {prompt} of the prompt "
            f"and {limit} of a caption that is {tokens}, more than budget ({recipe.budget}): {fix}, or raise budget"
        )


def policy_class(model: Any, recipe: Recipe) -> type[DecoderPolicy]:
    """Policy class for a model. Raises BadInput for unsupported models, or unsupported settings with a model."""
    refuse_unknown_layers(model, recipe.model)
    if is_captioner(model):
        if recipe.parallel == "sharded":
            raise BadInput(f"parallel: {type(model).__name__} cannot be split over processes; set it to replicated")
        if recipe.rollout.engine != "transformers":
            raise BadInput(f"rollout.engine: captions of {type(model).__name__} are sampled by transformers alone")
        return Blip2Policy if is_blip2(model) else EncoderDecoderPolicy
    if not hasattr(model, "model") or not hasattr(model.model, "visual"):
        raise BadInput(
            f"{recipe.model}: {type(model).__name__} is no captioner that the trainer knows "
            "(Qwen-VL, Qwen3.5, BLIP, BLIP-2 with OPT, ViT-GPT2)"
        )
    return DecoderPolicy


def value_head(recipe: Recipe, model: Any, weights: Path | None) -> ValueHead | None:
    """Value head of a critic, new or from a checkpoint; None if the recipe has no critic."""
    critic = recipe.algorithm.critic
    if critic is None:
        return None
    width = language_model(model).get_output_embeddings().weight.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # the same initial weights in all processes
        head = ValueHead(width, critic.detach, critic.hidden).to(model.device)
    if weights is not None:
        file = weights / VALUE_HEAD
        file = file if file.exists() else weights / file.name  # its location in older checkpoints
        head.load_state_dict(load_file(file, device=str(model.device)))
    return head


def adapt(model: Any, recipe: Recipe, lora: LoRAConfig, weights: Path | None) -> str:
    """Insert an adapter into ``model``, new or from a checkpoint; returns a description."""
    count = insert_adapter(model, lora, recipe.model, recipe.seed)
    if weights is not None:
        load_adapter(model, weights / FOLDER)
    return f"adapter of rank {lora.rank} learns ({count:,} weights)"


def computed_in(dtype: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype for a recipe's ``dtype``; None for the weights' own float32."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if dtype == "bfloat16" else None


def _scorer(policy: DecoderPolicy, without_adapter: bool = False) -> Callable[[Any], Tensor]:
    """Function that computes log-probabilities of a policy, or of its base model without the adapter."""

    @torch.no_grad()
    def score(batch: Batch) -> Tensor:
        with adapter_off(policy) if without_adapter else nullcontext():
            logp: Tensor = policy(batch).logp
        return logp

    return score


def freeze(model: Any, trained: TrainedConfig) -> str:
    """Freeze all but the trained parts, or everything if an adapter is trained; returns each part's state, in words."""
    states = []
    for name, weights in parts_of(model).items():
        learns = getattr(trained, name) and trained.lora is None
        for weight in weights:
            weight.requires_grad_(learns)
        count = sum(weight.numel() for weight in weights)
        states.append(f"{name} {'learns' if learns else 'frozen'} ({count:,} weights)")
    if trained.lora is None and not any(weight.requires_grad for weight in model.parameters()):
        raise BadInput(f"trained: of {type(model).__name__} nothing learns ({', '.join(states)}); choose another part")
    return ", ".join(states)


def parts_of(model: Any) -> dict[str, list[nn.Parameter]]:
    """Weights by part; a Qwen-VL's projector is its patch mergers (deepstack's, too)."""
    if is_captioner(model):
        return captioner_parts(model)
    visual = model.model.visual
    mergers = [module for name, module in visual.named_children() if "merger" in name]
    projector = {id(weight): weight for module in mergers for weight in module.parameters()}
    vision = [weight for weight in visual.parameters() if id(weight) not in projector]
    seen = {id(weight) for weight in visual.parameters()}
    llm = [weight for weight in model.parameters() if id(weight) not in seen]
    return {"vision": vision, "projector": list(projector.values()), "llm": llm}


def build_optimizer(policy: DecoderPolicy, config: OptimizerConfig, head_rate: float = 1.0) -> torch.optim.Optimizer:
    """AdamW over the trainable weights, with weight decay on matrices only.

    ``scale`` of a parameter group: factor on :func:`rate`; ``head_rate``: that of the value head.
    """
    head = {id(weight) for weight in (policy.value_head.parameters() if policy.value_head else ())}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for weight in policy.parameters():
        if weight.requires_grad:
            decay = config.weight_decay if weight.ndim >= 2 else 0.0
            groups.setdefault((decay, head_rate if id(weight) in head else 1.0), []).append(weight)
    described = [
        {"params": weights, "weight_decay": decay, "scale": scale} for (decay, scale), weights in groups.items()
    ]
    return torch.optim.AdamW(described, lr=config.lr, betas=config.betas)


def rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of ``step``, counted from 0."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    left = 1 - min(1.0, max(0, step - config.warmup) / max(1, steps - config.warmup))
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[config.schedule]
    return config.lr * warm * shape


def value_weights(parts: PolicyParts) -> dict[str, Tensor]:
    """Unsharded weights of the value head, empty without one; a collective call for all processes."""
    head = parts.policy.value_head
    return {} if head is None else {name: whole(weight) for name, weight in head.state_dict().items()}


def write_model(parts: PolicyParts, folder: Path) -> None:
    """Write weights (with an adapter merged in) and configuration only."""
    model = parts.sampled
    config = language_model(model).config.get_text_config()
    implementation = config._attn_implementation
    # Merged weights go to main memory, as a GPU may have no room for a second set.
    merged = dict(merged_weights(model, "cpu")) if has_adapter(model) else None
    model.save_pretrained(folder, state_dict=merged)
    config._attn_implementation = implementation


def write_policy(parts: PolicyParts, folder: Path, values: dict[str, Tensor]) -> None:
    """Write the policy as a Hugging Face folder: weights in safetensors, original tokenizer and processor.

    An adapter is merged into the weights, so that any engine can load them, and also saved separately to resume its
    training. ``values``: weights of the value head, saved separately.
    """
    from transformers import AutoProcessor

    write_model(parts, folder)
    if has_adapter(parts.sampled):
        save_adapter(parts.sampled, folder / FOLDER)
    if is_captioner(parts.sampled):  # some of these have no processor
        copy_readers(parts.folder, folder)
    else:
        AutoProcessor.from_pretrained(str(parts.folder), trust_remote_code=False).save_pretrained(folder)
    if values:
        (folder / VALUE_HEAD).parent.mkdir()
        save_file(values, folder / VALUE_HEAD)


def copy_readers(start: Path, folder: Path) -> None:
    """Copy the files of the tokenizer and the image processor from ``start`` to ``folder``."""
    for file in sorted(start.iterdir()):
        if any(fnmatch(file.name, pattern) for pattern in READERS):
            shutil.copyfile(file, folder / file.name)
