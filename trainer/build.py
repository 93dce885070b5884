"""Builds the policy of a run from its recipe, places it in memory, and writes its model files."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
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
from ..models.engines.hf.mixed_precision import frozen_copy, keep_rounded
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
from .policy.fsdp import copy_weights, shard, whole
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
from .policy.state import load_weights, state_of
from .recipe import Recipe
from .recipe_sections import TrainedConfig

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

    ``sampled``: the whole model that captions are sampled from, or that is handed to the rollout engine: the policy's
    own, or a copy (:func:`place_policy`); None in processes that need none. ``folder``: the folder that tokenizer and
    image processor are from, and the weights, unless ``state`` has newer ones.
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
    state: Path | None = None  # of a checkpoint that training goes on from


def build_policy(recipe: Recipe, weights: Path | None = None, distributed: Distributed = ALONE) -> PolicyParts:
    """Load ``recipe.model``, or its checkpoint ``weights``, freeze what is not trained, and place it in memory.

    Raises BadInput for models and prompts that the trainer does not support.
    """
    parts = load_policy(recipe, weights, distributed)
    place_policy(recipe, parts)
    return parts


def load_policy(recipe: Recipe, weights: Path | None = None, distributed: Distributed = ALONE) -> PolicyParts:
    """Load the policy whole and in float32, without reference and copies: as :func:`place_policy` wants it.

    ``weights``: a checkpoint; its weights are loaded here if they are a Hugging Face folder (as older ones all are),
    else by :func:`place_policy`. Raises BadInput for models and prompts that the trainer does not support.
    """
    start = resolve_model(recipe.model)
    state = None if weights is None else state_of(weights)
    before = weights if state is None else None
    folder = before or start
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
    kind = policy_class(model, recipe)
    learning = freeze(model, recipe.trained)
    if lora is not None:
        learning += f", {adapt(model, recipe, lora, before)}"
    policy = kind(
        model,
        barred_ids(model),
        recipe.rollout.temperature,
        value_head(recipe, model, before),
        computed_in(recipe.dtype, model.device),
    )
    preparing = batched_lm(model, str(folder), grid, template_args=recipe.template_args)
    pictures = Pictures(grid, recipe.rollout.decoders, lossless="://" in recipe.rollout.engine)
    return PolicyParts(policy, model, grid, preparing, pictures, None, folder, distributed, learning, state)


def place_policy(recipe: Recipe, parts: PolicyParts) -> None:
    """Make the reference and the sampler's copy, keep frozen weights in the computing type, split and load weights.

    In place; a collective call for all processes. The allocator's cache is emptied, as vLLM measures free memory.
    """
    policy, distributed = parts.policy, parts.distributed
    model, mesh = policy.model, distributed.mesh
    if recipe.algorithm.kl:
        if recipe.trained.lora is not None:
            parts.reference = _scorer(policy, without_adapter=True)
        else:
            frozen = _reference(recipe, parts)
            if distributed.sharded:
                shard(frozen, mesh, frozen=True)
            parts.reference = _scorer(frozen)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    keep_rounded(model, policy.dtype)
    parts.sampled = _sampled(recipe, parts)
    if distributed.sharded:
        shard(policy, mesh)
    if parts.state is not None:
        load_weights(parts.state, policy)
        if parts.sampled is not model:
            copy_weights(policy, parts.sampled)
    empty_cache(policy.device)


def empty_cache(device: torch.device) -> None:
    """Give memory that is no longer used back to the device, for other processes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reference(recipe: Recipe, parts: PolicyParts) -> DecoderPolicy:
    """A frozen policy with the weights that training started from."""
    policy = parts.policy
    start = resolve_model(recipe.model)
    if parts.folder == start:
        model: Any = frozen_copy(policy.model, policy.dtype)
    else:
        model = load_model(str(start), sees=True, dtype="float32", device=recipe.device).requires_grad_(False)
        keep_rounded(model, policy.dtype)
    banned = policy.get_buffer("banned").tolist()
    return type(policy)(model, banned=banned, temperature=policy.temperature, dtype=policy.dtype)


def _sampled(recipe: Recipe, parts: PolicyParts) -> Any:
    """The model that captions are sampled from, or that is handed to another engine (:class:`PolicyParts`).

    A copy, in the type that the policy computes in, if the policy's own weights are split or change while captions are
    sampled: on the device for the transformers engine; in main memory, in the first process, for any other.
    """
    policy = parts.policy
    own = recipe.rollout.engine == "transformers"
    if not (parts.distributed.sharded or (recipe.rollout.overlap and own)):
        return policy.model
    if own:
        return frozen_copy(policy.model, policy.dtype)
    return frozen_copy(policy.model, policy.dtype, "cpu", entirely=True) if parts.distributed.first else None


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


def value_weights(parts: PolicyParts) -> dict[str, Tensor]:
    """Unsharded weights of the value head, empty without one; a collective call for all processes."""
    head = parts.policy.value_head
    return {} if head is None else {name: whole(weight) for name, weight in head.state_dict().items()}


def model_weights(parts: PolicyParts) -> dict[str, Tensor]:
    """Whole weights under the base model's names, an adapter merged in, in main memory and the computing type.

    A collective call for all processes; the first alone gets them, the others nothing.
    """
    model: Any = parts.policy.model
    found: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # of the model's own weights, by id(): tied ones stay one
    weights = merged_weights(model) if has_adapter(model) else model.state_dict(keep_vars=True).items()
    for name, weight in weights:
        known = names.setdefault(id(weight), name) if isinstance(weight, nn.Parameter) else name
        gathered = whole(weight.detach()) if known == name else None
        if parts.distributed.first:
            dtype = parts.policy.dtype if weight.is_floating_point() else None
            found[name] = found[known] if gathered is None else gathered.to("cpu", dtype)
    return found


def write_model(parts: PolicyParts, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write configuration and weights, in the computing type and with an adapter merged in, and nothing else.

    ``weights``: those of :func:`model_weights`; by default those of ``parts.sampled``.
    """
    model = parts.policy.model
    config = language_model(model).config.get_text_config()
    implementation = config._attn_implementation
    if weights is None and parts.sampled is model:
        weights = model_weights(parts)
    (parts.sampled if weights is None else model).save_pretrained(folder, state_dict=weights)
    config._attn_implementation = implementation


def write_policy(
    parts: PolicyParts, folder: Path, values: dict[str, Tensor], weights: dict[str, Tensor] | None = None
) -> None:
    """Write the policy as a Hugging Face folder: weights in safetensors, original tokenizer and processor.

    An adapter is merged into the weights, so that any engine can load them, and also saved separately, as peft's tools
    read it. ``values``: weights of the value head, saved separately; ``weights``: as of :func:`write_model`.
    """
    from transformers import AutoProcessor

    model = parts.policy.model
    write_model(parts, folder, weights)
    if has_adapter(model):
        save_adapter(model, folder / FOLDER)
    if is_captioner(model):  # some of these have no processor
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
