"""Architectures, tokenizer and export of the bundled CLIPs and the image-text matching model.

``clip`` and ``eval-clip`` are open_clip models, ``itm`` is BLIP-2's image-text retrieval model in transformers; those
libraries' own loaders read the folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from open_clip import CLIP
from safetensors.torch import save_file
from tokenizers import normalizers, pre_tokenizers
from torch import nn
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
)

from ..world.captions import short_caption
from ..world.scenes import SHAPES, sample_of
from .architectures import SIDE, written
from .texts.hard_negatives import true_and_false
from .vision import MEAN, STD

PATCHES = {"clip": 14, "eval-clip": 16}
WIDTH, TEXT_LAYERS, VISION_LAYERS, EMBED = 128, 4, 4, 256
CONTEXT = 77
QUERIES = 12
PAD, UNK, CLS, MASK, SEP = "[PAD]", "[UNK]", "[CLS]", "[MASK]", "[SEP]"


def build_bert_tokenizer(seed: int, captions: int = 4000) -> BertTokenizer:
    """A tokenizer of the lower-cased words of the world's captions; other ASCII text encodes letter by letter.

    ``[SEP]`` has the highest id: open_clip finds the end of a text by it. The vocabulary is listed, not trained:
    WordPiece training breaks ties differently each time, and a resumed run would read different ids.
    """
    normal, cut = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for text in _texts(seed, captions) for word, _ in cut.pre_tokenize_str(normal.normalize_str(text))}
    letters = {chr(code) for code in range(33, 127)}
    pieces = sorted(words | letters | {f"##{letter}" for letter in letters})
    vocabulary = [PAD, UNK, CLS, MASK, *pieces, SEP]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(vocabulary)}, model_max_length=512)


def _texts(seed: int, captions: int) -> Iterator[str]:
    rng = Random(f"two towers:{seed}")
    for _ in range(captions):
        scene = sample_of("train", rng)
        yield from true_and_false(scene, rng)
        yield short_caption(scene, rng)
    yield from (f"{shape}s" for shape in SHAPES)


def clip_config(name: str, tokenizer: BertTokenizer) -> dict[str, Any]:
    """Content of ``open_clip_config.json``: model dimensions and image preprocessing."""
    return {
        "model_cfg": {
            "embed_dim": EMBED,
            "vision_cfg": {
                "image_size": SIDE,
                "patch_size": PATCHES[name],
                "layers": VISION_LAYERS,
                "width": WIDTH,
                "head_width": 32,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": len(tokenizer),
                "hf_tokenizer_name": ".",  # the folder itself
                "width": WIDTH,
                "heads": WIDTH // 32,
                "layers": TEXT_LAYERS,
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def build_clip(name: str, tokenizer: BertTokenizer) -> CLIP:
    """An untrained CLIP of :func:`clip_config`."""
    return CLIP(**clip_config(name, tokenizer)["model_cfg"])


def build_itm(tokenizer: BertTokenizer) -> Blip2ForImageTextRetrieval:
    """An untrained BLIP-2 retrieval model; its queries are initialised at random, as zeros would all be equal."""
    config = Blip2Config(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": WIDTH // 32,
            "image_size": SIDE,
            "patch_size": 14,
            "attention_dropout": 0.0,
            "initializer_range": 0.05,
        },
        qformer_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": WIDTH // 32,
            "intermediate_size": 3 * WIDTH,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": 512,
            "cross_attention_frequency": 1,
            "encoder_hidden_size": WIDTH,
            "use_qformer_text_input": True,
            "initializer_range": 0.05,
        },
        num_query_tokens=QUERIES,
        image_text_hidden_size=EMBED,
    )
    model = Blip2ForImageTextRetrieval(config)
    nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.3)
    nn.init.normal_(model.query_tokens, std=0.5)
    nn.init.normal_(model.embeddings.word_embeddings.weight, std=0.5)
    return model


def export_clip(name: str, model: CLIP, tokenizer: BertTokenizer, folder: Path) -> None:
    """Write ``model`` as a folder that ``open_clip.create_model("local-dir:...")`` reads."""
    with written(folder) as temporary:
        weights = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
        save_file(weights, temporary / "open_clip_model.safetensors", metadata={"format": "pt"})
        config = clip_config(name, tokenizer)
        (temporary / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(temporary)


def export_itm(model: Blip2ForImageTextRetrieval, tokenizer: BertTokenizer, folder: Path) -> None:
    """Write ``model`` as a Hugging Face folder with its processor."""
    copy = Blip2ForImageTextRetrieval(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    images = BlipImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD))
    with written(folder) as temporary:
        copy.save_pretrained(temporary)
        Blip2Processor(images, tokenizer).save_pretrained(temporary)
