"""A Qwen2.5-VL with random weights: 3B's true sizes, or small ones for a dry run, and the bundled captioner's words.

The vocabulary has 3B's 151,936 entries, of which the bundled tokenizer knows the first few hundred: the head costs what
it costs there, and ids beyond the tokenizer's become no text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

SOURCE = Path(__file__).resolve().parents[2] / "models/tiny/captioner"
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
FACTOR = 28  # pixels of an image token's side
VOCABULARY, CONTEXT = 151_936, 32_768
FULL = (7, 15, 23, 31)  # layers of the vision encoder that attend to the whole image


def write_config(folder: Path, layers: int | None = None, small: bool = False, image_tokens: int = 1024) -> Path:
    """Write configuration, tokenizer and processor, without weights. ``layers``: of text decoder and vision encoder.

    An image of ``image_tokens`` is as large as the processor lets it be.
    """
    folder.mkdir(parents=True)
    for name in COPIED:
        shutil.copyfile(SOURCE / name, folder / name)
    config = resized(json.loads((SOURCE / "config.json").read_text()), layers, small)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    processor = json.loads((SOURCE / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"shortest_edge": 56 * 56, "longest_edge": image_tokens * FACTOR**2}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=1))
    return folder


def resized(config: dict[str, Any], layers: int | None, small: bool) -> dict[str, Any]:
    """A Qwen2.5-VL's configuration with the sizes of 3B; ``small``: narrow layers, with as large a vocabulary."""
    width, inner, heads, section = (128, 256, 4, [4, 6, 6]) if small else (2048, 11_008, 16, [16, 24, 24])
    count, depth = layers or 36, layers or 32
    text = {
        "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": 2,
        "num_hidden_layers": count, "layer_types": ["full_attention"] * count, "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
    }  # fmt: skip
    seen, mlp, parts = (128, 256, 4) if small else (1280, 3420, 16)
    vision = {
        "depth": depth, "hidden_size": seen, "intermediate_size": mlp, "num_heads": parts, "out_hidden_size": width,
        "window_size": 112, "fullatt_block_indexes": [index for index in FULL if index < depth] or [depth - 1],
        "tokens_per_second": 2, "initializer_range": 0.02,
    }  # fmt: skip
    inside = {"text_config": config["text_config"] | text, "vision_config": config["vision_config"] | vision}
    return config | inside | {"tie_word_embeddings": True, "dtype": "float32"}


def random_model(folder: Path, device: torch.device) -> Any:
    """The model of :func:`write_config` in float32, initialised on ``device`` without a file; the same every time."""
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    with device:
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    return model.float()


def freeze_vision(model: Any) -> None:
    """The language model learns, as in the recipes of CapRL."""
    model.model.visual.requires_grad_(False)


def pictures(count: int, image_tokens: int) -> list[np.ndarray]:
    """Square images of random pixels, of ``image_tokens`` each."""
    import numpy as np

    side = FACTOR * round(image_tokens**0.5)
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(count)]
