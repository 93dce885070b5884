"""Architectures, initial weights and export of the plain captioners and the language model.

As usual for captioners, training does not start from scratch: the vision encoders and BLIP-2's Q-Former start from
``tiny/itm``, BLIP-2's language model from ``tiny/opt``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
    GenerationConfig,
    GPT2Config,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from .architectures import INITIAL_STD, SIDE, written
from .dual_encoder import VISION_LAYERS, WIDTH
from .texts.word_tokenizer import BOS, EOS, IMAGE, PAD
from .vision import MEAN, STD

TEXT_WIDTH = 160
TEXT_INNER = 480
LONGEST = 128  # tokens of a caption; the longest have eighty
QUERIES = 16
PATCH = 14
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": VISION_LAYERS,
    "num_attention_heads": WIDTH // 32,
    "image_size": SIDE,
    "patch_size": PATCH,
    "layer_norm_eps": 1e-6,
    "initializer_range": INITIAL_STD,
}


def build_vit_gpt2(tokenizer: PreTrainedTokenizerFast, seen: Blip2ForImageTextRetrieval) -> VisionEncoderDecoderModel:
    """ViT and GPT-2 with cross attention; the ViT starts from the vision encoder of ``seen``."""
    ids = special_ids(tokenizer)
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LONGEST,
        n_embd=TEXT_WIDTH,
        n_inner=TEXT_INNER,
        n_layer=3,
        n_head=TEXT_WIDTH // 32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=INITIAL_STD,
        add_cross_attention=True,
        is_decoder=True,
        **ids,
    )
    encoder = ViTConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **TOWER)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = ids["bos_token_id"]
    config.pad_token_id, config.eos_token_id = ids["pad_token_id"], ids["eos_token_id"]
    model = VisionEncoderDecoderModel(config=config)
    missing = model.encoder.load_state_dict(vit_weights(seen), strict=False)
    if missing.unexpected_keys or any(not key.startswith("pooler") for key in missing.missing_keys):
        raise RuntimeError(f"the tower of tiny/itm is no such ViT: {missing}")
    return model


def vit_weights(seen: Blip2ForImageTextRetrieval) -> dict[str, Tensor]:
    """Vision encoder weights of ``seen`` under the names of transformers' ViT, an equivalent architecture."""
    renamed: dict[str, Tensor] = {}
    names = {
        "embeddings.class_embedding": "embeddings.cls_token",
        "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
        "embeddings.position_embedding": "embeddings.position_embeddings",
        "encoder.layers.": "layers.",
        "self_attn.projection": "attention.o_proj",
        "layer_norm1": "layernorm_before",
        "layer_norm2": "layernorm_after",
        "post_layernorm": "layernorm",
    }
    for name, value in seen.vision_model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "self_attn.qkv" not in name:
            renamed[name] = value
            continue
        for part, piece in zip("qkv", value.chunk(3), strict=True):
            renamed[name.replace("self_attn.qkv", f"attention.{part}_proj")] = piece
    return renamed


def opt_config(tokenizer: PreTrainedTokenizerFast) -> OPTConfig:
    """About one million parameters; the same for the language model and for BLIP-2's."""
    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        word_embed_proj_dim=TEXT_WIDTH,
        ffn_dim=TEXT_INNER,
        num_hidden_layers=4,
        num_attention_heads=TEXT_WIDTH // 32,
        max_position_embeddings=2 * LONGEST,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=INITIAL_STD,
        **special_ids(tokenizer),
    )


def build_opt(tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """An untrained OPT."""
    return OPTForCausalLM(opt_config(tokenizer))


def build_blip2(
    tokenizer: PreTrainedTokenizerFast, seen: Blip2ForImageTextRetrieval, read: OPTForCausalLM
) -> Blip2ForConditionalGeneration:
    """BLIP-2: vision encoder, Q-Former and first queries start from ``seen``, the language model from ``read``."""
    q_former = {**seen.config.qformer_config.to_dict(), "use_qformer_text_input": False}
    config = Blip2Config(
        vision_config={**TOWER, "attention_dropout": 0.0},
        qformer_config=q_former,
        text_config=opt_config(tokenizer).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    model = Blip2ForConditionalGeneration(config)
    model.vision_model.load_state_dict(seen.vision_model.state_dict())
    known = model.qformer.state_dict()
    model.qformer.load_state_dict({name: value for name, value in seen.qformer.state_dict().items() if name in known})
    model.language_model.load_state_dict(read.state_dict())
    with torch.no_grad():
        torch.nn.init.normal_(model.query_tokens, std=0.5)
        model.query_tokens[:, : seen.query_tokens.shape[1]] = seen.query_tokens
    return model


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of the BOS, EOS and padding tokens under their names in configurations."""
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def export_plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a transformers folder in bfloat16, with the image processor of a vision model."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    start = special_ids(tokenizer)["bos_token_id"]
    copy.generation_config = GenerationConfig(decoder_start_token_id=start, **special_ids(tokenizer))
    look = {"size": {"height": SIDE, "width": SIDE}, "image_mean": list(MEAN), "image_std": list(STD), "resample": 3}
    with written(folder) as temporary:
        copy.save_pretrained(temporary)
        if isinstance(model, Blip2ForConditionalGeneration):
            Blip2Processor(BlipImageProcessor(**look), tokenizer, QUERIES).save_pretrained(temporary)
            return
        tokenizer.save_pretrained(temporary)
        if isinstance(model, VisionEncoderDecoderModel):
            ViTImageProcessor(**look).save_pretrained(temporary)
