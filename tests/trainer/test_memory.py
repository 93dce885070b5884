"""Memory by arithmetic against counted bytes of a small policy, and that the recipes fit the GPUs that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from capipe.errors import BadInput
from capipe.models.engines.context import text_room
from capipe.trainer.build import build_policy, freeze, load_policy
from capipe.trainer.distributed import ALONE
from capipe.trainer.memory import (
    GB,
    Layout,
    Memory,
    ModelSize,
    check_memory,
    estimate,
    largest_columns,
    refuse_too_large,
    size_of,
)
from capipe.trainer.policy.batch import Group, pack
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.policy.optimizer import build_optimizer
from capipe.trainer.recipe import Recipe, load_recipe

from .policies import completion, prompt

RECIPES = Path(__file__).parents[2] / "recipes"
SETTINGS: dict[str, Any] = {
    "model": "tiny/captioner",
    "data": {"shards": "", "questions": ""},
    "rewards": [{"kind": "length"}],
}


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate({**SETTINGS, **settings})


def held(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vision", [False, True])
def test_weights_gradients_moments_and_copies_are_the_bytes_that_are_held(dtype: str, vision: bool) -> None:
    settings = recipe(dtype=dtype, algorithm={"kl": 0.1}, trained={"vision": vision}, rollout={"overlap": True})
    half = dtype == "bfloat16"
    loaded = load_policy(settings)
    size = size_of(loaded.policy.model)
    loaded.pictures.close()
    memory = estimate(size, settings, Layout(half=half))
    parts = build_policy(settings)
    parts.pictures.close()
    policy, optimizer = parts.policy, build_optimizer(parts.policy, settings.optimizer)
    learning = [weight for weight in policy.parameters() if weight.requires_grad]
    for weight in learning:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert held(list(policy.model.parameters())) == memory.update["weights"]
    assert held([weight.grad for weight in learning if weight.grad is not None]) == memory.update["gradients"]
    assert held(moments) == memory.update["moments"]
    assert held(list(parts.sampled.parameters())) == memory.update["sampler's copy"] == memory.update["reference"]
    assert memory.fixed == sum(
        memory.update[name] for name in ("weights", "moments", "gradients", "reference", "sampler's copy")
    )


def test_an_adapter_has_few_moments_and_no_reference() -> None:
    settings = recipe(algorithm={"kl": 0.1}, trained={"lora": {"rank": 2}}, dtype="bfloat16")
    parts = load_policy(settings)
    parts.pictures.close()
    memory = estimate(size_of(parts.policy.model), settings, Layout())
    assert memory.update["reference"] == 0 and 0 < memory.update["moments"] < 0.2 * memory.update["weights"]


def test_a_run_says_what_it_needs_and_is_refused_by_a_gpu_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe()
    parts = load_policy(settings)
    parts.pictures.close()
    (line,) = check_memory(settings, parts.policy, 64, ALONE)
    assert line.startswith("memory of a process by arithmetic, GB: update ")
    monkeypatch.setattr(DecoderPolicy, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2_000_000_000))
    _, warning = check_memory(settings, parts.policy, 64, ALONE)  # some 1.5 GB are CUDA's own
    assert warning.startswith("warning: by arithmetic a step needs ")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10_000_000))
    with pytest.raises(BadInput, match=r"for each GPU of 0\.0 GB"):
        check_memory(settings, parts.policy, 64, ALONE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_about_the_bytes_that_autograd_keeps(checkpointing: bool) -> None:
    model = shaped(width=256, inner=1024, layers=6, heads=8, keys=2, vocabulary=60, device="cpu")
    model.requires_grad_(False)
    for weight in model.model.language_model.layers.parameters():
        weight.requires_grad_(True)
    policy = DecoderPolicy(model, dtype=torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    batch = pack([Group("a", "a", prompt(policy, None, 300, 1), [completion(100, seed) for seed in range(4)])])
    columns, kept = batch.ids.numel(), {}
    alive = []  # so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            alive.append(tensor)
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        policy.hidden(batch)
    settings = recipe(gradient_checkpointing=checkpointing)
    estimated = estimate(size_of(model), settings, Layout(columns=columns)).update["layers"]
    assert 0.7 < sum(kept.values()) / estimated < 1.4


def of_true_shape(size: str) -> Any:
    if size == "3b":
        return shaped(width=2048, inner=11008, layers=36, heads=16, keys=2, vocabulary=151936, tied=True)
    return shaped(width=3584, inner=18944, layers=28, heads=28, keys=4, vocabulary=152064)


def shaped(
    *,
    width: int,
    inner: int,
    layers: int,
    heads: int,
    keys: int,
    vocabulary: int,
    tied: bool = False,
    device: str = "meta",
) -> Any:
    """A Qwen2.5-VL of this shape."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sections = [width // heads // 8, width // heads * 3 // 16, width // heads * 3 // 16]
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": width}
    if device != "meta":
        vision |= {"depth": 1, "hidden_size": 64, "intermediate_size": 64}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def sizes() -> dict[str, ModelSize]:
    found = {}
    for size in ("3b", "7b"):
        model = of_true_shape(size)
        freeze(model, recipe().trained)
        found[size] = size_of(model)
    return found


def test_the_published_models_are_counted(sizes: dict[str, ModelSize]) -> None:
    assert sizes["3b"].weights == pytest.approx(3.755e9, rel=1e-3)
    assert sizes["3b"].learning == pytest.approx(3.086e9, rel=1e-3)
    assert sizes["7b"].weights == pytest.approx(8.292e9, rel=1e-3)
    assert sizes["7b"].rest == pytest.approx(2 * 152064 * 3584 + 45e6, rel=0.02)  # embedding, head, patch merger


def need(sizes: dict[str, ModelSize], name: str, shards: int) -> Memory:
    loaded = load_recipe(RECIPES / f"{name}.yaml")
    assert loaded.max_pixels is not None
    columns = largest_columns(loaded, loaded.max_pixels // 28**2, text_room([loaded.prompt], 0))
    size = sizes["7b" if "7B" in loaded.model else "3b"]
    return estimate(size, loaded, Layout(80 * GB, shards, 8, True, columns))


@pytest.mark.parametrize(
    ("name", "shards"),
    [("caprl-released", 1), ("caprl-released", 8), ("caprl-paper", 8), ("caprl-7b", 8), ("caprl-7b-3nodes", 8)],
)
def test_recipes_fit_gpus_of_80_gb(sizes: dict[str, ModelSize], name: str, shards: int) -> None:
    memory = need(sizes, name, shards)
    assert refuse_too_large(memory, 80 * GB) is None and memory.peak > 20 * GB
    # What the recipe's comment says.
    text = (RECIPES / f"{name}.yaml").read_text()
    for phase in (memory.update, memory.optimizer, memory.rollout):
        assert f"{sum(phase.values()) / GB:.1f} GB" in text, f"{sum(phase.values()) / GB:.1f} GB"


def test_what_cannot_fit_is_refused_and_what_may_not_is_warned_of(sizes: dict[str, ModelSize]) -> None:
    whole = estimate(sizes["7b"], load_recipe(RECIPES / "caprl-7b.yaml"), Layout(columns=34000))
    with pytest.raises(BadInput, match=r"123\.\d GB for each GPU of 80\.0 GB: split them"):
        refuse_too_large(whole, 80 * GB)
    long = estimate(sizes["3b"], load_recipe(RECIPES / "caprl-released.yaml"), Layout(columns=80_000))
    warning = refuse_too_large(long, 80 * GB)
    assert warning is not None and "layers 23.6" in warning and "rollout.max_tokens" in warning
    assert "optimizer's step" in long.line() and "GB: update" in long.line()
