"""Small random models of real architectures, written to folders, for what has no trained weights of its own here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchvision.models import vgg

from capipe.models.bundled import folder_of

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTHS = (8, "M", 16, 16, "M")


def words() -> Any:
    """The tokenizer of tiny/itm: words of the rendered world."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder_of("itm")).tokenizer


def spread(model: Any, std: float = 0.2) -> Any:
    """Weights far enough from zero that every input counts."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def blip_retrieval(folder: Path, seed: int = 0) -> Path:
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

    torch.manual_seed(seed)
    tokenizer = words()
    text = {"vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    ends = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    config = BlipConfig(
        text_config={**SMALL, **text, **ends},
        vision_config={**SMALL, "image_size": 64, "patch_size": 16},
        image_text_hidden_size=24,
    )
    spread(BlipForImageTextRetrieval(config)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


def opt(folder: Path, seed: int = 0) -> Path:
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder_of("reader"))
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=40, bos_token_id=1, eos_token_id=1, pad_token_id=0, dropout=0.0,
    )  # fmt: skip
    spread(OPTForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def vgg_net(folder: Path, seed: int = 0, **config: Any) -> Path:
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    net = vgg.make_layers(list(WIDTHS), batch_norm=False)
    weights = {f"features.{name}": value for name, value in net.state_dict().items()}
    save_file({**weights, "classifier.0.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    written = {"model_type": "vgg", "layers": WIDTHS, "image_size": 32, **config}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def diffusion(folder: Path, seed: int = 0) -> Path:
    """A pipeline on 16 x 16 pixels."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from capipe.models.pixel_diffusion import PixelDiffusionPipeline

    torch.manual_seed(seed)
    tokenizer = words()
    tokenizer.model_max_length = 24
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), **SMALL, max_position_embeddings=24, bos_token_id=2, eos_token_id=3
    )
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    pipeline = PixelDiffusionPipeline(unet.eval(), DDIMScheduler(), spread(CLIPTextModel(text)), tokenizer)
    pipeline.save_pretrained(folder)
    return folder
