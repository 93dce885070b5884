"""Captioners that are not chat models (BLIP, BLIP-2, ViT-GPT2), identified from their folders; nothing is loaded.

Each takes images of one size, and no chat: a few words that the caption continues, or no text at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ..images.grid import ImageGrid
from ..model_json import read_json


@dataclass(frozen=True)
class CaptionerKind:
    """``architecture``: transformers' class that writes captions; ``prompted``: whether it takes a text prefix."""

    architecture: str
    prompted: bool


KINDS = {  # by config.json's model_type
    "vision-encoder-decoder": CaptionerKind("VisionEncoderDecoderModel", prompted=False),
    "blip": CaptionerKind("BlipForConditionalGeneration", prompted=True),
    "blip-2": CaptionerKind("Blip2ForConditionalGeneration", prompted=True),
}


def kind_of(model_path: Path) -> CaptionerKind | None:
    """The captioner kind of a folder; None for other models. Raises BadInput for a related one that writes no text."""
    config = read_json(model_path / "config.json")
    kind = KINDS.get(config.get("model_type", ""))
    written = config.get("architectures") or []
    if kind is not None and written and kind.architecture not in written:
        raise BadInput(f"{model_path}: {written[0]} writes no captions; name a {kind.architecture}")
    return kind


def one_size(model_path: Path, min_pixels: int | None, max_pixels: int | None) -> ImageGrid:
    """The grid of a captioner: one cell, of the size that its image processor makes of every image.

    Raises BadInput where the size is missing or not square, or the caller wants another.
    """
    file, processor = _image_processor(model_path)
    side = _side(processor.get("crop_size") if processor.get("do_center_crop") else processor["size"])
    if side is None:
        raise BadInput(f"{file}: 'size' is {processor['size']!r}; write a square one, height and width in pixels")
    for name, limit in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if limit is not None:
            raise BadInput(
                f"{name} {limit}: {model_path} looks at {side} x {side} pixels and nothing else; leave it out"
            )
    return ImageGrid(side, side * side, side * side)


def _image_processor(model_path: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's configuration; of the two possible files the newer wins, as in transformers."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (model_path / name).is_file():
            written = read_json(model_path / name)
            processor = written.get("image_processor", written)
            if processor.get("size"):
                return model_path / name, processor
    raise BadInput(f"{model_path}: a vision model without a preprocessor_config.json; add the original's")


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        return size["height"] if size.get("height") == size.get("width") else None
    return size if isinstance(size, int) else None


def check_prompt(model: str, model_path: Path, text: str, system: str | None = None) -> None:
    """Raise BadInput where the model does not take this text, or needs some and gets none."""
    kind = kind_of(model_path)
    if kind is None:
        if not text.strip():
            raise BadInput(f"{model}: a chat model is asked with words; write a prompt")
    elif system is not None:
        raise BadInput(f"{model}: {kind.architecture} reads no system message; leave it out")
    elif text and not kind.prompted:
        raise BadInput(f'{model}: {kind.architecture} reads no prompt; leave it empty (--prompt none, prompt: "")')
