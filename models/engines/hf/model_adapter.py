"""Adapters for model families: pixels, image features, positions, and how the decoder is called.

:class:`ChatAdapter` is for chat models, text-only or of the Qwen-VL family; those of captioners that are not chat
models are in :mod:`.captioner_adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from ..base import ImageInput
from ..prompting import rgb_pixels
from .kv_cache import new_cache
from .prefix_tree import Level

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, GenerationConfig, LogitsProcessorList, PreTrainedModel

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


# Text models of attention and gated delta layers whose prompts may be padded on the left. The model zeroes the input of
# such columns; without biases their keys and values are 0, the convolution reads them as its own zeros before a prompt,
# and a state of 0 stays 0, as 0 decays to 0 and each update is a multiple of its key. Padding after a token would decay
# that token's state: so nothing is shared.
HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text")


@dataclass(frozen=True)
class PreparedImage:
    """``patches``: ``(patches, patch values)``; ``grid``: ``(1, 3)`` its time, height and width in patches.

    For captioners that take images of one size, ``patches`` is the image, ``(1, 3, side, side)``.
    """

    uid: str
    patches: Tensor
    grid: Tensor


@dataclass(frozen=True)
class PreparedPrompt:
    """``ids``: ``(length,)`` with the image placeholder repeated; ``positions``: ``(axes, length)``.

    ``next_position``: position of the first generated token, on every axis.
    """

    ids: Tensor
    positions: Tensor
    next_position: int
    image: PreparedImage | None


class ModelAdapter(Protocol):
    """``lm``: the model that predicts tokens; ``body``: the same up to its last hidden states, the input of ``head``.

    ``axes``: of positions; ``needs_mask``: even where nothing is padded; ``shares``: whether prefixes that prompts
    share may be computed once, with padding between tokens.
    """

    axes: int
    shares: bool
    needs_mask: bool
    lm: Any
    body: Any

    def prepare_image(self, image: ImageInput) -> PreparedImage:
        """Pixels as the vision encoder takes them. Raises RequestError."""
        ...

    def expand(self, ids: Tensor, image: PreparedImage) -> Tensor:
        """A prompt's ids ``(length,)`` with the placeholder repeated for each of the image's tokens."""
        ...

    def positions(self, ids: Tensor, image: PreparedImage | None) -> Tensor:
        """``(axes, length)``."""
        ...

    def is_image(self, ids: Tensor) -> Tensor:
        """Mask of the ids, of any shape, that stand for pixels."""
        ...

    def new_cache(self) -> Cache: ...

    def look(self, images: Sequence[PreparedImage]) -> Any:
        """Vision encoder output for distinct images, in order."""
        ...

    def vision(self, prompts: Sequence[PreparedPrompt], level: Level, seen: Any, places: dict[str, int]) -> Any:
        """The part of ``seen`` that the rows of a level need, or None; ``places``: each image's index in it, by uid."""
        ...

    def inputs(self, ids: Tensor, positions: Tensor, cache: Any, vision: Any) -> dict[str, Any]:
        """Arguments of ``lm`` and ``body``, other than cache and mask.

        For ``ids`` (rows, width) and ``positions`` (axes, rows, width).
        """
        ...

    def head(self, hidden: Tensor, product: Product = functional.linear) -> Tensor:
        """Last hidden states (rows, width) -> logits (rows, vocab); ``product``: of its inputs, matrix and bias."""
        ...

    def generate(self, prompt: PreparedPrompt, config: GenerationConfig, processors: LogitsProcessorList) -> Any:
        """transformers' ``generate`` on one prompt, the slow reference; ``sequences`` begin with the prompt's ids."""
        ...


class ChatAdapter:
    """Causal language models, and the Qwen-VL family, whose positions have three axes (time, height, width)."""

    needs_mask = False

    def __init__(self, model: PreTrainedModel, image_processor: BaseImageProcessor | None) -> None:
        self.lm = self._model = model
        self.image_processor = image_processor
        # Duck-typed, as the classes of the family have no common base.
        self.body: Any = model.base_model
        self._has_axes = hasattr(self.body, "get_rope_index")
        self.axes = 3 if self._has_axes else 1
        # Padding between tokens would count in a sliding window, and a recurrent layer would read it.
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
        self.shares = all(kind == "full_attention" for kind in kinds)

    def prepare_image(self, image: ImageInput) -> PreparedImage:
        assert self.image_processor is not None  # the encoder refuses images to models without one
        processed = self.image_processor(images=[rgb_pixels(image)], return_tensors="pt")
        return PreparedImage(image.uid, processed["pixel_values"], processed["image_grid_thw"])

    def expand(self, ids: Tensor, image: PreparedImage) -> Tensor:
        merged = int(image.grid.prod()) // self.body.config.vision_config.spatial_merge_size**2
        return ids.repeat_interleave(torch.where(self.is_image(ids), merged, 1))

    def positions(self, ids: Tensor, image: PreparedImage | None) -> Tensor:
        if not self._has_axes:
            return torch.arange(len(ids))[None]
        kinds = self.is_image(ids).int()
        grid = None if image is None else image.grid
        positions: Tensor = self.body.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grid)[0]
        return positions[:, 0]

    def is_image(self, ids: Tensor) -> Tensor:
        mask: Tensor = ids == self._model.config.image_token_id
        return mask

    def new_cache(self) -> Cache:
        return new_cache(self._model.config.get_text_config(), self.shares)

    def look(self, images: Sequence[PreparedImage]) -> Any:
        patches = torch.cat([image.patches for image in images]).to(self._model.device)
        grids = torch.cat([image.grid for image in images]).to(self._model.device)
        return self.body.get_image_features(patches, grids, return_dict=True)

    def vision(self, prompts: Sequence[PreparedPrompt], level: Level, seen: Any, places: dict[str, int]) -> Any:
        parts = image_parts(self, prompts, level, places)
        if not parts:
            return None
        of_level = copy(seen)
        of_level.pooler_output = tuple(seen.pooler_output[index][rows] for index, rows in parts)
        if getattr(seen, "deepstack_features", None) is not None:  # Qwen3-VL uses several layers
            of_level.deepstack_features = [
                tuple(layer[index][rows] for index, rows in parts) for layer in seen.deepstack_features
            ]
        return of_level

    def inputs(self, ids: Tensor, positions: Tensor, cache: Any, vision: Any) -> dict[str, Any]:
        inputs = {"input_ids": ids, "position_ids": positions if self._has_axes else positions[0]}
        return inputs if vision is None else {**inputs, "mm_encoder_outputs": {"image": vision}}

    def head(self, hidden: Tensor, product: Product = functional.linear) -> Tensor:
        head: Any = self._model.get_output_embeddings()
        return product(hidden, head.weight, head.bias)

    def generate(self, prompt: PreparedPrompt, config: GenerationConfig, processors: LogitsProcessorList) -> Any:
        model: Any = self._model
        ids = prompt.ids[None].to(model.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.image is not None:
            inputs["pixel_values"] = prompt.image.patches.to(model.device)
            inputs["image_grid_thw"] = prompt.image.grid.to(model.device)
            inputs["mm_token_type_ids"] = self.is_image(ids).int()
        return model.generate(**inputs, generation_config=config, logits_processor=processors)


def image_parts(
    family: ModelAdapter, prompts: Sequence[PreparedPrompt], level: Level, places: dict[str, int]
) -> list[tuple[int, slice]]:
    """The image tokens within a level, row by row: the image's index and the slice of its tokens.

    A cut may be inside an image.
    """
    parts: list[tuple[int, slice]] = []
    for segment in level:
        prompt = prompts[segment.of]
        if prompt.image is not None:
            is_image = family.is_image(prompt.ids[: segment.end])
            start, end = int(is_image[: segment.start].sum()), int(is_image.sum())
            if end > start:
                parts.append((places[prompt.image.uid], slice(start, end)))
    return parts
