"""Low-rank adapters (LoRA, arXiv 2106.09685) on the language model's matrices, by peft, put into the model in place.

The model keeps its class and the names of its parts, so that whoever samples from it or trains it sees the adapted one.
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

FOLDER, WEIGHTS = "adapter", "adapter_model.safetensors"  # within a checkpoint; the file's name is peft's
NAME = "default"
PREFIX = "base_model.model."  # what peft puts before a weight's name in its files


class LoRAConfig(BaseModel):
    """An adapter of the language model learns, and nothing else; the KL term's reference is the model without it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, description="what the adapter makes is multiplied with alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of its inputs left out while training")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="names of the language model's matrices that get one; the vision tower's never do",
    )


def insert_adapter(model: Any, config: LoRAConfig, start: str, seed: int) -> int:
    """Give the frozen ``model`` an adapter that changes nothing yet; returns how many weights it has.

    ``start``: what the model is called, for the adapter's file; ``seed``: of its first weights.
    Raises BadInput without peft, and where a target is none of the language model's.
    """
    need_peft()
    from peft import LoraConfig, inject_adapter_in_model

    _known_targets(model, config.targets)
    names = "|".join(map(re.escape, config.targets))
    made = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # peft says int, and only ever divides it
        lora_dropout=config.dropout,
        target_modules=rf".*\blanguage_model\..*\b({names})",
        base_model_name_or_path=start,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # all processes begin alike
        inject_adapter_in_model(made, model, NAME)
    model.train(model.training)  # peft's new modules are in training, and would sample with dropout
    return sum(weight.numel() for weight in adapter_weights(model).values())


def need_peft() -> None:
    """Raises BadInput where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f"trained.lora: peft does not import ({error}); pip install 'capipe[lora]', or train all weights"
        ) from None


def _known_targets(model: Any, targets: Sequence[str]) -> None:
    within = [name.partition("language_model.") for name, module in model.named_modules() if _adaptable(name, module)]
    linear = {inside.rpartition(".")[2] for _, found, inside in within if found}
    if not linear:
        raise BadInput(f"trained.lora: nothing of {type(model).__name__} takes an adapter; train its weights instead")
    missing = [target for target in targets if target not in linear]
    if missing:
        raise BadInput(
            f"trained.lora.targets: the language model has no {', '.join(missing)}; it has {', '.join(sorted(linear))}"
        )


def _adaptable(name: str, module: nn.Module) -> bool:
    """The head is not: log-probabilities are computed from its matrix alone."""
    return isinstance(module, nn.Linear) and not name.endswith("lm_head")


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's weights by the names that peft's files have."""
    return {
        PREFIX + name.replace(f".{NAME}.", "."): weight
        for name, weight in model.named_parameters()
        if f".lora_A.{NAME}." in name or f".lora_B.{NAME}." in name
    }


def has_adapter(model: nn.Module) -> bool:
    return bool(_layers(model))


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before training."""
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
    """All weights under the plain model's names, the adapter's part added to each; ``model`` is left as it is.

    Those that an adapter changes are new tensors, on ``device`` where one is named; the others are the model's own.
    """
    layers = _layers(model)
    for name, weight in model.state_dict().items():
        if ".lora_" in name:
            continue
        owner, inside, rest = name.partition(".base_layer.")
        if inside and rest == "weight":
            yield f"{owner}.weight", (weight + layers[owner].get_delta_weight(NAME)).to(device)
        else:
            yield name.replace(".base_layer.", "."), weight


def save_adapter(model: Any, folder: Path) -> None:
    """Weights and settings as peft loads them (``PeftModel.from_pretrained``)."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().contiguous() for name, weight in adapter_weights(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[NAME].save_pretrained(folder)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Fill ``model``'s adapter from the files of :func:`save_adapter`. Raises BadInput where they do not fit."""
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
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
