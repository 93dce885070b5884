"""Small random captioners of all three kinds as folders: two layers each, a byte-sized vocabulary, 32 pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipTextConfig,
    GPT2Config,
    OPTConfig,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

KINDS = ("vit-gpt2", "blip", "blip2")
SIDE = 32
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")  # the first four ids
PAD, START, END, IMAGE = range(4)
WORDS = ("a", "red", "blue", "circle", "square", "on", "the", "left", "right", "of", "green", "table", "two", "large")
VOCABULARY = 24  # some of it unnamed: random models draw ids, and their text is hardly read
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
    "initializer_range": 0.2,
}
HIDDEN = 32


def random_captioner(kind: str, seed: int = 0, **text: Any) -> Any:
    """``text``: further settings of the decoder; dropout is as large as in published models unless told."""
    torch.manual_seed(seed)
    model = _MAKERS[kind](text)
    with torch.no_grad():  # initialisations differ in scale; this makes tokens differ in likelihood
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.25)
    model.tie_weights()
    return model.eval()


def _vit_gpt2(text: dict[str, Any]) -> Any:
    decoder = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        **_ids(),
        add_cross_attention=True,
        is_decoder=True,
        **text,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = START, PAD, END
    model = VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = START
    return model


def _blip(text: dict[str, Any]) -> Any:
    written = BlipTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        sep_token_id=END,
        **_ids(),
        **text,
    )
    return BlipForConditionalGeneration(BlipConfig(text_config=written.to_dict(), vision_config=VISION))


def _blip2(text: dict[str, Any]) -> Any:
    written = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **{"word_embed_proj_dim": HIDDEN, **_ids(), **text},
    )
    qformer = Blip2QFormerConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=24
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=written.to_dict(),
        num_query_tokens=5,
        image_token_index=IMAGE,
    )
    return Blip2ForConditionalGeneration(config)


def _ids() -> dict[str, int]:
    return {"bos_token_id": START, "pad_token_id": PAD, "eos_token_id": END}


_MAKERS = {"vit-gpt2": _vit_gpt2, "blip": _blip, "blip2": _blip2}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word each, spaces part of what follows them."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    vocabulary |= {f"w{number}": number for number in range(len(vocabulary), VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made.decoder = decoders.WordPiece(prefix="##")
    named = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, **named, additional_special_tokens=["<image>"])


def write_captioner(folder: Path, kind: str, seed: int = 0, **text: Any) -> Path:
    """A folder as a hub has it; its image processor would resize by itself."""
    model = random_captioner(kind, seed, **text)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    BlipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]
    return folder
