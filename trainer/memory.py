"""Memory of a training process by arithmetic, in bytes: what a recipe needs of each GPU, before anything is allocated.

Weights, gradients, moments and frozen copies are exact. Activations, what FSDP2 gathers and the allocator's waste are
estimates from shapes; nothing here was measured on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import BadInput
from ..models.engines.context import text_room
from ..models.engines.hf.captioner_adapter import is_captioner, language_model
from ..models.engines.hf.mixed_precision import cast_at_use
from .distributed import Distributed
from .policy.decoder import DecoderPolicy
from .policy.token_logprobs import CHUNK_LOGITS
from .recipe import Recipe

CONTEXT = 1.5e9  # CUDA's context, kernels and communication buffers: assumed
WASTE = 0.05  # of the update's memory, lost to the allocator's fragments: assumed
CHUNKS = 5  # tensors of a chunk of logits at once: probabilities, gradients, two products for entropy's, factors
GB = 1e9
INNER = ("intermediate_size", "ffn_dim", "n_inner")  # names of an MLP's width


@dataclass(frozen=True)
class ModelSize:
    """Weights by what becomes of them, and the shapes that activations follow from.

    ``matrices``: of ``learning`` or ``frozen``, those that a copy keeps in the computing type (``cast_at_use``).
    ``layer``, ``rest``: weights of a decoder layer, and of the unit that FSDP2 splits last (embeddings, head, norms).
    """

    learning: int
    frozen: int
    learning_matrices: int
    frozen_matrices: int
    layer: int
    rest: int
    layers: int
    width: int
    inner: int
    attention: int  # width of all query heads
    keys: int  # width of all key heads
    vocabulary: int

    @property
    def weights(self) -> int:
        return self.learning + self.frozen

    def copied(self, half: bool) -> int:
        """Bytes of a frozen copy, whose matrices are in bfloat16 with ``half``, and all else in float32."""
        return 4 * self.weights - 2 * half * (self.learning_matrices + self.frozen_matrices)


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU in each phase of a step, by part; ``fixed`` parts do not depend on captions' lengths."""

    update: dict[str, float]
    optimizer: dict[str, float]
    rollout: dict[str, float]
    fixed: float

    @property
    def peak(self) -> float:
        return max(sum(phase.values()) for phase in (self.update, self.optimizer, self.rollout))

    def line(self) -> str:
        """The estimate in one line."""
        phases = {"update": self.update, "optimizer's step": self.optimizer, "rollout": self.rollout}
        sums = ", ".join(f"{name} {sum(phase.values()) / GB:.1f}" for name, phase in phases.items())
        return (
            f"memory of a process by arithmetic, GB: {sums} (weights, gradients, moments, copies {self.fixed / GB:.1f})"
        )


@dataclass(frozen=True)
class Layout:
    """Where a recipe runs. ``shards``: processes that weights are split over; ``local``: processes of a node.

    ``card``: bytes of a GPU, of which vLLM takes its share; ``half``: computes in bfloat16.
    """

    card: float = 80 * GB
    shards: int = 1
    local: int = 1
    half: bool = True
    columns: int = 0  # of the largest micro-batch: :func:`largest_columns`


def size_of(model: Any) -> ModelSize:
    """Count a model's weights, on any device (also "meta"); call it before frozen weights are rounded or split."""
    lm = language_model(model)
    config = lm.config.get_text_config()
    matrices = cast_at_use(model)
    counts = {(learns, matrix): 0 for learns in (True, False) for matrix in (True, False)}
    for weight in model.parameters():
        counts[weight.requires_grad, id(weight) in matrices] += weight.numel()
    layers = _layers(model, lm)
    in_layers = sum(_count(layer) for layer in layers)
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSize(
        learning=counts[True, True] + counts[True, False],
        frozen=counts[False, True] + counts[False, False],
        learning_matrices=counts[True, True],
        frozen_matrices=counts[False, True],
        layer=max(_count(layer) for layer in layers),
        rest=sum(counts.values()) - in_layers,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=next((getattr(config, name) for name in INNER if getattr(config, name, None)), 4 * config.hidden_size),
        attention=heads * head,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head,
        vocabulary=len(lm.get_output_embeddings().weight),
    )


def _layers(model: Any, lm: Any) -> list[nn.Module]:
    """Layers that FSDP2 splits one by one; for captioners, which it does not split, the whole model."""
    if is_captioner(model):
        return [model]
    return [*model.model.visual.blocks, *model.model.language_model.layers]


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def largest_columns(recipe: Recipe, image: int, prompt: int) -> int:
    """Tokens in the largest forward pass: ``budget``, or a group (``image`` and ``prompt`` tokens once) if larger."""
    return max(recipe.budget, image + prompt + recipe.rollout.group * recipe.rollout.max_tokens)


def estimate(size: ModelSize, recipe: Recipe, layout: Layout) -> Memory:
    """Memory of a process of ``recipe``. Pure.

    The decoder's layers begin with float32 states under autocast, as residuals are summed up in float32. With gradient
    checkpointing a layer keeps its inputs only; one that is computed again keeps, per column: two norms' inputs,
    normalised states and casts (10 bytes each wide), queries, keys, values and their rotations, attention's output, and
    the MLP's four products in the computing type; its gradients are a third of that.
    """
    rollout, half, shards = recipe.rollout, layout.half, layout.shards
    own, sharded = rollout.engine == "transformers", shards > 1
    computed = 2 if half else 4
    weights = (4 * size.learning + 4 * size.frozen - 2 * half * size.frozen_matrices) / shards
    gradients, moments = 4 * size.learning / shards, 8 * size.learning / shards
    reference = size.copied(half) / shards if recipe.algorithm.kl and recipe.trained.lora is None else 0
    copied = size.copied(half) if own and (sharded or rollout.overlap) else 0
    # Whole while it is computed with: the last unit, a layer and the next; gradients of the first two until reduced.
    gathered = 4 * (2 * size.rest + 3 * size.layer) if sharded else 0
    kept = 20 * size.width + computed * (3 * size.attention + 3 * size.keys + 4 * size.inner)
    cast = 2 * half * size.layer  # a layer's matrices, which its backward pass needs as they were cast
    layers = layout.columns * 4 * size.width * size.layers, layout.columns * kept * 4 / 3 + cast
    if not recipe.gradient_checkpointing:
        layers = (layout.columns * kept + cast) * size.layers, layout.columns * kept / 3
    head = size.vocabulary * size.width * (2 + 4 + 4 if half else 4)  # rounded; its gradient, and a chunk's
    engine = rollout.gpu_memory * layout.card if rollout.engine == "vllm" else 0
    always = {"weights": weights, "moments": moments, "reference": reference, "sampler's copy": copied}
    beside = {"context": CONTEXT, "engine": 0 if rollout.sleep else engine}
    update = {
        **always,
        **beside,
        "gradients": gradients,
        "gathered": gathered,
        "layers": layers[0],
        "a layer again": layers[1],
        "logits": 4 * CHUNKS * CHUNK_LOGITS,
        "head": head,
    }
    update["allocator"] = WASTE * (sum(update.values()) - update["engine"] - CONTEXT)
    return Memory(
        update=update,
        optimizer={**always, **beside, "gradients": gradients, "AdamW's step": gradients},
        rollout={**always, **beside, "engine": engine},
        fixed=sum(always.values()) + gradients,
    )


def check_memory(recipe: Recipe, policy: DecoderPolicy, image: int, distributed: Distributed) -> list[str]:
    """The estimate for this run in one line, and a warning if a GPU is too small for it; call before weights are split.

    ``image``: tokens of the largest image. Raises BadInput as :func:`refuse_too_large`.
    """
    device, mesh = policy.device, distributed.mesh
    card = float(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else 0.0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.count))
    shards = 1 if not distributed.sharded else mesh.size(1) if mesh is not None else distributed.count
    columns = largest_columns(recipe, image, text_room([recipe.prompt], 0))
    memory = estimate(size_of(policy.model), recipe, Layout(card, shards, local, policy.dtype is not None, columns))
    warning = refuse_too_large(memory, card) if card else None
    return [memory.line(), *([warning] if warning else [])]


def refuse_too_large(memory: Memory, card: float) -> str | None:
    """A warning if a step may not fit into the GPU's ``card`` bytes, None if it does.

    Raises BadInput if even the parts that are exactly known do not.
    """
    if memory.fixed > card:
        raise BadInput(
            f"weights, gradients, moments and frozen copies are {memory.fixed / GB:.1f} GB for each GPU of "
            f"{card / GB:.1f} GB: split them (parallel: sharded, under torchrun), train an adapter (trained.lora), or "
            "leave the reference out (algorithm.kl: 0)"
        )
    if memory.peak <= card:
        return None
    phase = max((memory.update, memory.optimizer, memory.rollout), key=lambda parts: sum(parts.values()))
    largest = ", ".join(f"{name} {size / GB:.1f}" for name, size in sorted(phase.items(), key=lambda x: -x[1])[:4])
    return (
        f"warning: by arithmetic a step needs {memory.peak / GB:.1f} GB of a GPU of {card / GB:.1f} GB ({largest}): "
        "lower rollout.max_tokens, budget, max_pixels or rollout.gpu_memory, or split weights (parallel: sharded)"
    )
