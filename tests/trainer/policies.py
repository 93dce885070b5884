"""Small random policies of three families, and groups for them."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from capipe.models.engines.base import Completion
from capipe.models.engines.hf.model_adapter import PreparedImage, PreparedPrompt
from capipe.trainer.policy.batch import Group
from capipe.trainer.policy.decoder import DecoderPolicy

from ..models.hybrids import random_hybrid

VOCABULARY, IMAGE, VIDEO, START, END = 60, 55, 56, 57, 58
PATCH_VALUES = {"qwen2.5": 3 * 2 * 14 * 14, "qwen3": 3 * 2 * 16 * 16, "qwen3.5": 3 * 2 * 16 * 16}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def random_model(family: str, seed: int = 0, layers: int = 2) -> Any:
    """A Qwen-VL of 32 wide with heads that share keys, in float64 so that only mistakes are seen.

    "qwen3.5" has three layers, and computes its delta rule in float32.
    """
    if family == "qwen3.5":
        return random_hybrid(IDS, seed=seed, vocab_size=VOCABULARY).double()
    torch.manual_seed(seed)
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    if family == "qwen3":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        vision = {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
            "initializer_range": 0.3,
        }
        text = {**text, "head_dim": 8, "rope_parameters": rope}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **IDS)
        return Qwen3VLForConditionalGeneration(config).double()
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.3,
    }
    config = Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **IDS)
    return Qwen2_5_VLForConditionalGeneration(config).double()


def image(family: str, grid: tuple[int, int, int], seed: int) -> PreparedImage:
    torch.manual_seed(1000 + seed)
    patches = torch.randn(grid[0] * grid[1] * grid[2], PATCH_VALUES[family], dtype=torch.float64)
    return PreparedImage(f"image{seed}", patches, torch.tensor([grid]))


def prompt(policy: DecoderPolicy, seen: PreparedImage | None, words: int, seed: int) -> PreparedPrompt:
    """``words`` random tokens after the image, with the positions that the model itself would give them."""
    rng = Random(seed)
    text = [rng.randrange(50) for _ in range(words)]
    base = policy.base
    if seen is None:
        ids = torch.tensor(text)
        return PreparedPrompt(ids, torch.arange(words).expand(3, -1), words, None)
    merged = int(seen.grid.prod()) // base.config.vision_config.spatial_merge_size**2
    ids = torch.tensor([START, *[IMAGE] * merged, END, *text])
    kinds = (ids == IMAGE).int()[None]
    positions = base.get_rope_index(ids[None], mm_token_type_ids=kinds, image_grid_thw=seen.grid)[0][:, 0]
    return PreparedPrompt(ids, positions, int(positions.max()) + 1, seen)


def completion(length: int, seed: int) -> Completion:
    rng = Random(f"completion {seed}")
    tokens = tuple(rng.randrange(50) for _ in range(length))
    return Completion("", tokens, "stop", length)


def groups(policy: DecoderPolicy, family: str) -> list[Group]:
    """Two image sizes, a prompt without an image, unequal prompts and completions, one of a single token."""
    small, large = image(family, (1, 4, 4), 1), image(family, (1, 4, 8), 2)
    made = [
        Group("a", "a", prompt(policy, small, 5, 1), [completion(n, n) for n in (7, 3, 1)]),
        Group("b", "b", prompt(policy, large, 2, 2), [completion(n, 10 + n) for n in (2, 5)]),
        Group("c", "c", prompt(policy, small, 9, 3), [completion(n, 20 + n) for n in (4, 4, 6)]),
        Group("d", "d", prompt(policy, None, 6, 4), [completion(3, 30)]),
    ]
    return made
