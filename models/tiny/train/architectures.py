"""Architectures of the bundled models and their export as Hugging Face folders: bf16 weights, tokenizer, template."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from .texts.tokenizer import CHAT_TEMPLATE, END, IMAGE, PAD, START, VIDEO, VISION_END, VISION_START

PATCH = 14
MERGE = 2
SIDE = 112  # pixels; the processor never makes an image's area larger than SIDE squared
IMAGE_TOKENS = (SIDE // PATCH // MERGE) ** 2
GRID_THW = (1, SIDE // PATCH, SIDE // PATCH)  # one frame, in patches
TEXT_WIDTH = 192
VISION_WIDTH = 128
INITIAL_STD = 0.05  # weights this narrow learn slowly from the usual 0.02
READER_STD = 0.08  # readers need sharp attention from the start, to find one thing among others


def build_config(tokenizer: PreTrainedTokenizerFast, layers: int = 4) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of about three million parameters; heads of width 32, the minimum of vLLM's CPU attention."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (START, END, PAD, IMAGE, VIDEO)}
    depth = 4
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 512,
            "num_hidden_layers": layers,
            "num_attention_heads": TEXT_WIDTH // 32,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "initializer_range": INITIAL_STD,
            "bos_token_id": ids[START],
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
        },
        vision_config={
            "depth": depth,
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 384,
            "num_heads": VISION_WIDTH // 32,
            "out_hidden_size": TEXT_WIDTH,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": SIDE,
            "fullatt_block_indexes": list(range(depth)),
            "initializer_range": INITIAL_STD,
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=tokenizer.convert_tokens_to_ids(VISION_START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(VISION_END),
        tie_word_embeddings=True,
    )


def build_reader_config(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, inner: int) -> Qwen2Config:
    """A text-only decoder; ``width``: a multiple of 32; ``inner``: width of the MLPs."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (START, END, PAD)}
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=READER_STD,
        bos_token_id=ids[START],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """Qwen's processor around ``tokenizer``: at most ``IMAGE_TOKENS`` tokens for an image of any size."""
    limits = {"shortest_edge": 56 * 56, "longest_edge": SIDE * SIDE}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits, patch_size=PATCH, merge_size=MERGE),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=limits, patch_size=PATCH, merge_size=MERGE),
        chat_template=CHAT_TEMPLATE,
    )


def export_folder(
    model: Qwen2_5_VLForConditionalGeneration | Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write ``model`` as a Hugging Face folder. Files are replaced atomically: readers never see a partial one."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        bos_token_id=tokenizer.convert_tokens_to_ids(START),
    )
    sees = isinstance(model, Qwen2_5_VLForConditionalGeneration)
    with written(folder) as temporary:
        copy.save_pretrained(temporary)
        (build_processor(tokenizer) if sees else tokenizer).save_pretrained(temporary)


@contextlib.contextmanager
def written(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files are moved into ``folder``, each atomically, once all are written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        yield Path(temporary)
        for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
            file.chmod(0o644)  # safetensors makes files readable by their owner only
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
