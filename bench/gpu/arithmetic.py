"""Floating point operations of a training step, and the share of a device's peak that they amount to (MFU).

A multiplication and an addition count as two. Of the model only matrix products and attention count, as in PaLM's
appendix B (Chowdhery et al. 2022); a backward pass counts twice its forward pass, and what gradient checkpointing
computes again counts nothing. The vision encoder is frozen and has a forward pass alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORWARD_AND_BACKWARD = 3
#: Dense bfloat16 peak, operations a second, by the makers' data sheets; the first name that a device's contains counts.
PEAKS = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "L40S": 362e12,
    "A100": 312e12,
}


@dataclass(frozen=True)
class Decoder:
    """Sizes of a text decoder with gated MLPs; ``kv``: width of all key heads."""

    layers: int
    width: int
    inner: int
    heads: int  # width of all query heads
    kv: int
    vocabulary: int

    def tokens(self, count: int) -> float:
        """Matrix products of the layers for ``count`` tokens, forward."""
        return 2.0 * count * self.layers * (self.width * (2 * self.heads + 2 * self.kv) + 3 * self.width * self.inner)

    def attention(self, pairs: float) -> float:
        """Attention in all layers, forward; ``pairs``: of a query and a key that it attends to."""
        return 4.0 * pairs * self.layers * self.heads

    def head(self, count: int) -> float:
        """Logits of ``count`` tokens, forward."""
        return 2.0 * count * self.width * self.vocabulary


@dataclass(frozen=True)
class Vision:
    """Sizes of a vision encoder with gated MLPs; ``merge`` patches become a token of ``out`` numbers.

    ``full`` layers attend to the whole image, the others within windows of ``window`` patches.
    """

    layers: int
    width: int
    inner: int
    patch: int  # numbers in a patch
    merge: int
    out: int
    full: int
    window: int

    def image(self, patches: int) -> float:
        """An image's forward pass."""
        products = self.layers * (4 * self.width**2 + 3 * self.width * self.inner) + self.patch * self.width
        keys = self.full * patches + (self.layers - self.full) * min(self.window, patches)
        merged = self.merge * self.width
        merger = merged * (merged + self.out) * (patches // self.merge)
        return 2.0 * patches * products + 4.0 * patches * keys * self.width + 2.0 * merger


@dataclass(frozen=True)
class Lengths:
    """Sizes of a step: ``images`` groups of ``group`` captions of ``caption`` tokens after ``prompt`` tokens."""

    images: int
    group: int
    prompt: int  # image included
    patches: int
    caption: int

    @property
    def sampled(self) -> int:
        """Caption tokens of the step."""
        return self.images * self.group * self.caption


def sizes(config: Any) -> tuple[Decoder, Vision]:
    """Sizes of a Qwen2.5-VL from transformers' configuration."""
    text, vision = config.get_text_config(), config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    decoder = Decoder(
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
        head * text.num_attention_heads,
        head * text.num_key_value_heads,
        text.vocab_size,
    )
    side = vision.window_size // vision.patch_size
    encoder = Vision(
        vision.depth,
        vision.hidden_size,
        vision.intermediate_size,
        vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        vision.spatial_merge_size**2,
        vision.out_hidden_size,
        len([index for index in vision.fullatt_block_indexes if index < vision.depth]),
        side * side,
    )
    return decoder, encoder


def needed(decoder: Decoder, vision: Vision, lengths: Lengths) -> float:
    """Operations that no trainer can save: each image and prompt once, and each caption token that predicts another.

    Every caption attends to its prompt and to itself. The head is computed for the tokens that captions consist of.
    """
    read = lengths.caption - 1  # the last token predicts nothing
    pairs = _causal(lengths.prompt) + lengths.group * (read * lengths.prompt + _causal(read))
    learned = decoder.tokens(lengths.prompt + lengths.group * read) + decoder.attention(pairs)
    learned += decoder.head(lengths.group * lengths.caption)
    return lengths.images * (vision.image(lengths.patches) + FORWARD_AND_BACKWARD * learned)


def by_sequence(decoder: Decoder, vision: Vision, lengths: Lengths) -> float:
    """Operations where every caption is a sequence of its own, with its image and prompt before it."""
    whole = lengths.prompt + lengths.caption
    learned = decoder.tokens(whole) + decoder.attention(_causal(whole)) + decoder.head(lengths.caption)
    return lengths.images * lengths.group * (vision.image(lengths.patches) + FORWARD_AND_BACKWARD * learned)


def _causal(length: int) -> float:
    return length * (length + 1) / 2


def peak_of(device: str) -> float | None:
    """Operations a second of a device by its name; None if unknown."""
    return next((peak for name, peak in PEAKS.items() if name.lower() in device.lower()), None)


def mfu(operations: float, seconds: float, peak: float | None) -> float | None:
    """Share of the peak: operations ÷ (seconds x peak), rounded; None without a known peak."""
    return None if peak is None else round(operations / (seconds * peak), 4)


def step_ratios(trl: Mapping[str, float], capipe: Mapping[str, float]) -> dict[str, float]:
    """TRL's seconds ÷ capipe's, for the whole step and its two parts."""
    return {name: round(trl[name] / capipe[name], 3) for name in ("step", "rollout", "update")}
