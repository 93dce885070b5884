"""Text-to-image diffusion of rendered scenes at 32 pixels: a small UNet on pixels that attends to a caption's tokens.

The text encoder starts from that of ``tiny/clip``. Its tokenizer ends every text with nine tokens, one for each cell,
and it first learns, on text alone, to encode there what the text states about the cell. Then the UNet is trained, with
these nine laid out over the image (:func:`...pixel_diffusion.laid_out`). With attention alone, 320 steps taught it
backgrounds and nothing of the things.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from ...bundled import resolve
from ...pixel_diffusion import PixelDiffusionPipeline, encode_texts, laid_out
from ..world.captions import dense_caption, short_caption
from ..world.render import BACKGROUNDS, COLORS, render
from ..world.scenes import MOST_THINGS, PLACES, Scene, sample_of, scenes
from .architectures import written
from .batches import SIGN_SHARE, Truth, truth_of
from .dual_encoder import CLS, CONTEXT, PAD, SEP, TEXT_LAYERS, UNK, WIDTH
from .schedule import Schedule
from .texts.web_captions import plain_caption
from .train_vgg import levels, pictures
from .training_loop import TrainingLoop
from .vision import CellReader, SlotReader, reading_loss

SIDE = 32
STEPS, GUIDANCE = 20, 2.0
KEPT = 0.995  # decay per step of the weights' moving average
TELLINGS = (dense_caption, dense_caption, dense_caption, short_caption, plain_caption)
CELLS = tuple(f"[CELL{at}]" for at in range(len(PLACES)))
GRID = 3  # cells in a row, and rows
UNTOLD = 0.1  # share of empty texts, for classifier-free guidance
UNET: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": 3 + WIDTH,
    "out_channels": 3,
    "block_out_channels": (16, 32, 64, 96),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,  # diffusers uses it as the number of heads
}


@dataclass(frozen=True)
class DiffusionPlan(Schedule):
    """``images`` per step; the first ``reading_steps`` train the text encoder alone, the others the UNet alone."""

    images: int = 32
    reading_steps: int = 500
    workers: int = 1


@dataclass(frozen=True)
class Drawings:
    """Images (n, SIDE, SIDE, 3) uint8, a text about each, and the labels, which texts may state only in part."""

    pixels: Tensor
    texts: list[str]
    truth: Truth


class DiffusionBatches(Dataset[Drawings]):
    """``self[step]``: the batch of that step, a function of (seed, step) only."""

    def __init__(self, plan: DiffusionPlan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> Drawings:
        rng = Random(f"drawing:{self.plan.seed}:{step}")
        most = min(MOST_THINGS, 2 + step // 100)
        shown = [sample_of("train", rng, most, SIGN_SHARE) for _ in range(self.plan.images)]
        if step < self.plan.reading_steps:  # reading is learnt from complete captions
            texts = [dense_caption(scene, rng) for scene in shown]
        else:
            texts = ["" if rng.random() < UNTOLD else rng.choice(TELLINGS)(scene, rng) for scene in shown]
        pixels = pictures([render(scene, rng, SIDE) for scene in shown])
        return Drawings(pixels, texts, truth_of(shown))


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of ``tiny/clip``, with a token for each cell appended to every text."""
    known = BertTokenizer.from_pretrained(resolve("tiny/clip"), trust_remote_code=False)
    core = Tokenizer.from_str(known.backend_tokenizer.to_str())
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CELLS])
    special = [(token, core.token_to_id(token)) for token in (CLS, SEP, *CELLS)]
    core.post_processor = processors.TemplateProcessing(
        single=" ".join((CLS, "$A", SEP, *CELLS)), special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        sep_token=SEP,
        additional_special_tokens=list(CELLS),
        model_max_length=CONTEXT + len(CELLS),
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    """The text encoder of ``tiny/clip`` as transformers' equivalent CLIP, extended by the cells' tokens."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=WIDTH // 32,
        max_position_embeddings=CONTEXT + len(CELLS),
        hidden_act="gelu",
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    weights = load_file(Path(resolve("tiny/clip")) / "open_clip_model.safetensors")
    known = clip_text_weights({key: value.float() for key, value in weights.items()})
    ours = model.state_dict()
    for name, value in known.items():
        ours[name][: len(value)] = value
    nn.init.normal_(ours["embeddings.token_embedding.weight"][-len(CELLS) :], std=0.3)
    return model


def clip_text_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's text encoder weights under transformers' names."""
    renamed: dict[str, Tensor] = {
        "embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
        "final_layer_norm.weight": weights["ln_final.weight"],
        "final_layer_norm.bias": weights["ln_final.bias"],
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for key, value in weights.items():
        if not key.startswith("transformer.resblocks."):
            continue
        name = key.replace("transformer.resblocks.", "encoder.layers.")
        for old, new in names.items():
            name = name.replace(old, new)
        if "in_proj" not in name:
            renamed[name] = value
            continue
        for part, piece in zip("qkv", value.chunk(3), strict=True):
            renamed[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = piece
    return renamed


class DiffusionTrainer(TrainingLoop[Drawings]):
    """Trainer of UNet and text encoder; exports the exponential moving average of their weights."""

    def __init__(self, plan: DiffusionPlan) -> None:
        torch.manual_seed(plan.seed)
        self.tokenizer = build_text_tokenizer()
        text, unet = build_text_encoder(self.tokenizer), UNet2DConditionModel(**UNET)
        self.plan, self.model = plan, nn.ModuleDict({"text_encoder": text, "unet": unet})
        self.readers = nn.ModuleList([SlotReader(WIDTH), CellReader(WIDTH, tokens=0)])
        self.mean = copy.deepcopy(self.model).requires_grad_(False)
        self.noise = DDIMScheduler(
            num_train_timesteps=1000,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",  # a network this small learns to predict noise only slowly
            clip_sample=True,
            timestep_spacing="trailing",
        )
        super().__init__(plan, self.model, self.readers)

    def batches(self) -> Iterator[Drawings]:
        yield from DataLoader(
            DiffusionBatches(self.plan),
            batch_size=None,
            sampler=range(self.progress.step, self.plan.steps),
            num_workers=self.plan.workers,
            prefetch_factor=8 if self.plan.workers else None,
        )

    def step(self, batch: Drawings, rate: float) -> dict[str, float]:
        states, mask = encode_texts(self.model["text_encoder"], self.tokenizer, batch.texts)
        if self.progress.step < self.plan.reading_steps:
            last = mask.sum(1, keepdim=True) - len(CELLS) + torch.arange(len(CELLS))
            slots = states.gather(1, last[:, :, None].expand(-1, -1, WIDTH))
            loss, read = reading_loss(self.readers[0](slots), batch.truth)
            words_loss, _ = reading_loss(self.readers[1](states), batch.truth)  # word tokens: the cells copy them
            report = {"reading": loss.item(), "cells": sum(read[:4]) / 4, "words": words_loss.item()}
            loss = loss + words_loss
        else:
            loss = self.diffusion_loss(batch, states.detach(), mask)  # the text encoder is trained already
            report = {"drawing": loss.item()}
        report["norm"] = self.update(loss, rate)
        kept = min(KEPT, self.progress.step / (self.progress.step + 10))
        with torch.no_grad():
            for mean, now in zip(self.mean.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(now, 1 - kept)
        return report

    def diffusion_loss(self, batch: Drawings, states: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of the clean image that the UNet predicts from a noisy one."""
        chance = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.progress.step)
        clean = levels(batch.pixels)
        noise = torch.randn(clean.shape, generator=chance)
        count = self.noise.config.num_train_timesteps
        times = torch.randint(0, count, (len(clean),), generator=chance)
        noisy = self.noise.add_noise(clean, noise, times)
        shown = torch.cat([noisy, laid_out(states, mask, GRID, (SIDE, SIDE))], dim=1)
        predicted = self.model["unet"](shown, times, encoder_hidden_states=states, encoder_attention_mask=mask).sample
        return functional.mse_loss(predicted, clean)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "mean": self.mean.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.mean.load_state_dict(state["mean"])

    def export(self, folder: Path) -> None:
        parts = copy.deepcopy(self.mean).half()
        pipeline = PixelDiffusionPipeline(parts["unet"], self.noise, parts["text_encoder"], self.tokenizer, GRID)
        with written(folder) as temporary:
            pipeline.save_pretrained(temporary, safe_serialization=True)


def generated_right(images: Tensor, shown: Sequence[Scene]) -> dict[str, float]:
    """Shares of things and of empty cells with the right colour, in images (n, 3, side, side) from 0 to 1.

    The colour is the palette's nearest to the mean of a cell's middle; in empty cells it must be the background's.
    """
    palette = {**COLORS, **BACKGROUNDS}
    names, values = list(palette), torch.tensor(list(palette.values())) / 255
    right: dict[str, list[bool]] = {"things": [], "empty": []}
    side = images.shape[-1]
    for image, scene in zip(images, shown, strict=True):
        there = {thing.place: thing.color for thing in scene.things}
        for at, place in enumerate(PLACES):
            if scene.sign is not None and scene.sign.place == place:
                continue
            row, column = (round(side * (2 * index + 1) / 6) for index in divmod(at, 3))
            middle = image[:, row - 1 : row + 1, column - 1 : column + 1].mean((1, 2))
            nearest = names[int((values - middle).square().sum(1).argmin())]
            right["things" if place in there else "empty"].append(nearest == there.get(place, scene.background))
    return {kind: sum(hits) / max(1, len(hits)) for kind, hits in right.items()}


def diffusion_report(
    folder: str, count: int, seed: int = 1, steps: int = STEPS, guidance: float = GUIDANCE
) -> dict[str, float]:
    """:func:`generated_right` of images generated from held-out scenes' dense captions, and of rendered ones."""
    pipeline = PixelDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, trust_remote_code=False)
    pipeline.set_progress_bar_config(disable=True)
    shown = list(scenes("heldout", count, seed))
    texts = [dense_caption(scene, Random(f"{seed}:{at}")) for at, scene in enumerate(shown)]
    images = []
    for start in range(0, count, 50):
        chance = [torch.Generator().manual_seed(at) for at in range(start, min(count, start + 50))]
        images.append(pipeline(texts[start : start + 50], steps, guidance, chance, output_type="pt").images)
    true = levels(pictures([render(scene, Random(f"{seed}:{at}"), SIDE) for at, scene in enumerate(shown)])) / 2 + 0.5
    generated = generated_right(torch.cat(images), shown)
    return {**generated, **{f"rendered_{kind}": share for kind, share in generated_right(true, shown).items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure a diffusion model's colours and places on held-out scenes.")
    parser.add_argument("folder", help="an exported pipeline, or tiny/diffusion")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    options = parser.parse_args(arguments)
    shares = diffusion_report(resolve(options.folder), options.scenes, steps=options.steps, guidance=options.guidance)
    print(json.dumps(shares))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
