"""Small random Qwen3.5 models: gated delta layers that remember, around one of attention."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from capipe.models.bundled import folder_of

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "max_position_embeddings": 512,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "rope_parameters": ROPE,
    "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}


def random_hybrid(ids: dict[str, int], patch: int = 16, moe: bool = False, seed: int = 0, **text: Any) -> Any:
    """``ids``: of the image's tokens; ``text``: further settings of the decoder."""
    torch.manual_seed(seed)
    vision = {**VISION, "patch_size": patch, "num_position_embeddings": 64, "initializer_range": 0.3}
    of_text = {**TEXT, **(EXPERTS if moe else {}), **text}
    config, kind = (
        (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration)
        if moe
        else (Qwen3_5Config, Qwen3_5ForConditionalGeneration)
    )
    model = kind(config(text_config=of_text, vision_config=vision, **ids)).float().eval()
    remember(model)
    return model


@torch.no_grad()
def remember(model: torch.nn.Module) -> None:
    """Decay as slow as a trained model's: by default little is left of a state after three tokens."""
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.copy_(torch.linspace(0.01, 0.3, len(weight)).log())


def write_hybrid(folder: Path, moe: bool = False, seed: int = 0) -> Path:
    """A folder with the words, the template and the image processor of the bundled captioner."""
    captioner = folder_of("captioner")
    written = json.loads((captioner / "config.json").read_text())
    ids = {name: written[name] for name in written if name.endswith("_token_id")}
    words = {name: written["text_config"][name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    random_hybrid(ids, 14, moe, seed, **words).save_pretrained(folder)
    for file in captioner.iterdir():
        weights = file.name.endswith((".safetensors", ".index.json"))
        if not weights and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return folder
