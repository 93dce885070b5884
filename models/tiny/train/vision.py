"""Batched vision encoder for images of one size, and the auxiliary heads that train it on the cells' contents.

Transformers encodes a batch's images one after another on a CPU; here they are rows of one batch. A test checks that
both agree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
)
from transformers.vision_utils import get_vision_position_ids

from ..world.scenes import BACKGROUNDS, COLORS, PLACES, SIZES, WORDS
from .architectures import IMAGE_TOKENS, MERGE, PATCH, SIDE, TEXT_WIDTH
from .batches import IGNORE, WHAT, Truth

GRID = SIDE // PATCH
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def patches(pixels: Tensor) -> Tensor:
    """(images, SIDE, SIDE, 3) uint8 -> (images * 64, 1176) float, as the processor normalises and orders them."""
    normal = (pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    images, half = len(pixels), GRID // MERGE
    tiles = normal.view(images, half, MERGE, PATCH, half, MERGE, PATCH, 3)
    ordered = tiles.permute(0, 1, 4, 2, 5, 7, 3, 6)  # image, then merged row and column, patch within, channel, y, x
    doubled = ordered.unsqueeze(6).expand(*ordered.shape[:6], 2, PATCH, PATCH)  # a still image is two equal frames
    return doubled.reshape(images * GRID * GRID, -1)


def image_tokens(tower: Qwen2_5_VisionTransformerPretrainedModel, pixels: Tensor) -> Tensor:
    """(images, SIDE, SIDE, 3) uint8 -> (images, IMAGE_TOKENS, TEXT_WIDTH), as ``tower`` encodes each alone."""
    images = len(pixels)
    x = tower.patch_embed(patches(pixels)).view(images, GRID * GRID, -1)
    cos, sin = tower.rotary_pos_emb(x, get_vision_position_ids(torch.tensor([[1, GRID, GRID]]), MERGE))
    for block in tower.blocks:
        x = x + _attend(block.attn, block.norm1(x), cos, sin)
        x = x + block.mlp(block.norm2(x))
    merged: Tensor = tower.merger(x.flatten(0, 1))
    return merged.view(images, IMAGE_TOKENS, -1)


def _attend(attention: Qwen2_5_VLVisionAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Full attention within each row of (images, patches, width)."""
    query, key, value = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(_rotated(query, cos, sin), _rotated(key, cos, sin), value)
    projected: Tensor = attention.proj(mixed.transpose(1, 2).flatten(2))
    return projected


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class CellReader(nn.Module):
    """Auxiliary head: classifies every cell from an image's tokens. Trains the vision encoder in minutes; not exported.

    All cells share one classifier, so that the language model sees the same features of a colour in every cell.
    """

    def __init__(self, width: int = TEXT_WIDTH, tokens: int = IMAGE_TOKENS) -> None:
        """``tokens`` 0: no position embeddings here, so the vision encoder itself must encode positions."""
        super().__init__()
        self.places = nn.Parameter(torch.randn(tokens, width) * 0.3) if tokens else 0.0
        self.queries = nn.Parameter(torch.randn(len(PLACES), width))
        self.attention = nn.MultiheadAttention(width, width // 32, batch_first=True)
        self.cell = nn.Linear(width, sum(self.widths()))
        self.background = nn.Linear(width, len(BACKGROUNDS))

    @staticmethod
    def widths() -> list[int]:
        """Number of classes of each question about a cell: what, color, size, word."""
        return [len(WHAT), len(COLORS), len(SIZES), len(WORDS)]

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(images, tokens, width) -> logits (images, 9, answers) for each question, then (images, 4)."""
        queries = self.queries.expand(len(tokens), -1, -1)
        read, _ = self.attention(queries, tokens + self.places, tokens, need_weights=False)
        return [*self.cell(read).split(self.widths(), dim=-1), self.background(tokens.mean(1))]


class SlotReader(nn.Module):
    """Auxiliary head: classifies each cell from its own vector, (images, 9, width): nine slots or slices of one vector.

    Like :class:`CellReader`, it trains a model to represent each cell, and is not exported.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.Linear(width, sum(CellReader.widths()))
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, slots: Tensor) -> list[Tensor]:
        """Logits (images, 9, answers) for each question, then (images, 4)."""
        return [*self.cell(slots).split(CellReader.widths(), dim=-1), self.background(slots.mean(1))]


def reading_loss(logits: list[Tensor], truth: Truth) -> tuple[Tensor, list[float]]:
    """The summed cross entropy of :class:`CellReader` and its accuracy per question, as the fields of ``truth``."""
    targets = [truth.what, truth.color, truth.size, truth.word, truth.background]
    losses, accuracies = [], []
    for guess, target in zip(logits, targets, strict=True):
        asked = target != IGNORE
        if not asked.any():
            accuracies.append(float("nan"))
            continue
        losses.append(functional.cross_entropy(guess[asked], target[asked]))
        accuracies.append((guess[asked].argmax(-1) == target[asked]).float().mean().item())
    return torch.stack(losses).sum(), accuracies
