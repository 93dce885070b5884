"""Low-rank adapters (LoRA, arXiv 2106.09685) on the language model's matrices, inserted in place by peft.

The model keeps its class and the names of its modules, so that sampling and training use the adapted model unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import BadInput

FOLDER, WEIGHTS = "adapter", "adapter_model.safetensors"  # in a checkpoint; the file name is peft's
NAME = "default"
PREFIX = "base_model.model."  # prefix of weight names in peft's files


class LoRAConfig(BaseModel):
    """An adapter of the language model learns, and nothing else; the KL term's reference is the model without it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, description="what the adapter makes is multiplied with alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of its inputs left out while training")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="names of the language model's matrices that get one; the vision encoder's never do",
    )


def insert_adapter(model: Any, config: LoRAConfig, start: str, seed: int) -> int:
    """Insert an adapter, initially without effect, into the frozen ``model``; returns its number of weights.

    ``start``: name of the base model, for the adapter's file; ``seed``: of the initial weights.
    Raises BadInput without peft, or if a target is not in the language model.
    """
    need_peft()
    from peft import LoraConfig, inject_adapter_in_model

    _known_targets(model, config.targets)
    names = "|".join(map(re.escape, config.targets))
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # annotated as int, but peft only divides it
        lora_dropout=config.dropout,
        target_modules=rf".*\blanguage_model\..*\b({names})",
        base_model_name_or_path=start,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same initial weights in all processes
        inject_adapter_in_model(peft_config, model, NAME)
    model.train(model.training)  # peft's new modules are in training mode, so sampling would use dropout
    return sum(weight.numel() for weight in adapter_weights(model).values())


def need_peft() -> None:
    """Raise BadInput if peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f"trained.lora: peft does not import ({error}); pip install 'capipe[lora]', or train all weights"
        ) from None


def _known_targets(model: Any, targets: Sequence[str]) -> None:
    within = [name.partition("language_model.") for name, module in model.named_modules() if _adaptable(name, module)]
    linear = {inside.rpartition(".")[2] for _, separator, inside in within if separator}
    if not linear:
        raise BadInput(f"trained.lora: nothing of {type(model).__name__} takes an adapter; train its weights instead")
    missing = [target for target in targets if target not in linear]
    if missing:
        raise BadInput(
            f"trained.lora.targets: the language model has no {', '.join(missing)}; it has {', '.join(sorted(linear))}"
        )


def _adaptable(name: str, module: nn.Module) -> bool:
    """Whether a module can get an adapter: not the head, since log-probabilities use its matrix only."""
    return isinstance(module, nn.Linear) and not name.endswith("lm_head")


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of the adapter, by their names in peft's files."""
    return {
        PREFIX + name.replace(f".{NAME}.", "."): weight
        for name, weight in model.named_parameters()
        if f".lora_A.{NAME}." in name or f".lora_B.{NAME}." in name
    }


def has_adapter(model: nn.Module) -> bool:
    return bool(_layers(model))


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Disable the adapter while the body runs: the model before training."""
    layers = list(_layers(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_weights(model: nn.Module, device: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """All weights under the base model's names, with the adapter's part added; ``model`` is unchanged.

    Adapted weights are new tensors, on ``device`` if given; the others are the model's own.
    """
    layers = _layers(model)
    for name, weight in model.state_dict(keep_vars=True).items():
        if ".lora_" in name:
            continue
        owner, inside, rest = name.partition(".base_layer.")
        if inside and rest == "weight":
            yield f"{owner}.weight", (weight + layers[owner].get_delta_weight(NAME)).to(device)
        else:
            yield name.replace(".base_layer.", "."), weight


def save_adapter(model: Any, folder: Path) -> None:
    """Write weights and settings in peft's format (``PeftModel.from_pretrained``)."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().contiguous() for name, weight in adapter_weights(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[NAME].save_pretrained(folder)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Load ``model``'s adapter from the files of :func:`save_adapter`. Raises BadInput if they do not fit."""
    file = folder / WEIGHTS
    try:
        loaded = load_file(file)
    except OSError as error:
        raise BadInput(
            f"{file}: cannot be read ({error}); remove the checkpoint to go on from the one before"
        ) from None
    own = adapter_weights(model)
    if loaded.keys() != own.keys() or any(loaded[name].shape != own[name].shape for name in own):
        raise BadInput(f"{file}: is of another adapter than the recipe's trained.lora; use another --out")
    for name, weight in own.items():
        weight.copy_(loaded[name])


def _layers(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
