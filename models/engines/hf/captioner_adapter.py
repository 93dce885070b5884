"""Adapters for captioners that are not chat models: BLIP-2 with OPT, and encoder-decoders (ViT-GPT2, BLIP).

BLIP-2 puts its Q-Former's output before a causal decoder's text, so whatever holds for chat models holds for it.
Decoders of the others attend to the encoder's states, whose keys and values are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from ....errors import BadInput
from ..base import ImageInput, RequestError
from ..captioner_registry import KINDS
from ..prompting import rgb_pixels
from ..sampling import vision_ids
from .kv_cache import CrossCache, new_cache
from .model_adapter import ChatAdapter, ModelAdapter, PreparedImage, PreparedPrompt, Product, image_parts
from .prefix_tree import Level

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, GenerationConfig, LogitsProcessorList, PreTrainedModel


def is_captioner(model: Any) -> bool:
    """Whether a loaded model is a captioner that is not a chat model."""
    return model.config.model_type in KINDS


def adapter_of(model: PreTrainedModel, image_processor: BaseImageProcessor | None) -> ModelAdapter:
    """The adapter for a model."""
    if not is_captioner(model):
        return ChatAdapter(model, image_processor)
    return Blip2Adapter(model, image_processor) if is_blip2(model) else EncoderDecoderAdapter(model, image_processor)


def is_blip2(model: Any) -> bool:
    return bool(model.config.model_type == "blip-2")


def is_blip(model: Any) -> bool:
    return bool(model.config.model_type == "blip")


def check_parts(model: Any, side: int) -> None:
    """Raise BadInput for a captioner with unknown parts, or of another size than ``side`` pixels."""
    decoder = language_model(model).config.model_type
    known = {"blip-2": "opt", "vision-encoder-decoder": "gpt2"}.get(model.config.model_type, decoder)
    if decoder != known:
        raise BadInput(f"{type(model).__name__} with a {decoder} decoder is not known here; take one with {known}")
    if is_blip2(model) and model.config.image_token_id is None:
        raise BadInput(f"{model.name_or_path}: its config.json has no image_token_index; add the original's newest one")
    size = image_size(model)
    if size != side:
        raise BadInput(
            f"{type(model).__name__} looks at {size} x {size} pixels, and its image processor makes {side} x {side}; "
            "mend 'size' in its preprocessor_config.json"
        )


def image_size(model: Any) -> int:
    """Side of a captioner's input images, in pixels."""
    size = vision_model(model).config.image_size
    return int(size if isinstance(size, int) else size[0])


def vision_model(model: Any) -> Any:
    """The vision encoder of a captioner."""
    return model.vision_model if hasattr(model, "vision_model") else model.encoder


def language_model(model: Any) -> Any:
    """The model that writes text, with its head: a part of captioners, the whole of chat models."""
    if not is_captioner(model):
        return model
    if is_blip2(model):
        return model.language_model
    return model.text_decoder if is_blip(model) else model.decoder


def body_of(model: Any) -> Any:
    """The same without its head."""
    lm = language_model(model)
    return lm.bert if is_blip(model) else lm.base_model


def encode_images(model: Any, images: Sequence[PreparedImage]) -> Tensor:
    """The image features that a captioner's text is generated from, ``(images, tokens, width)``.

    The projected queries of a Q-Former, or an encoder's states, as wide as the decoder attends to.
    """
    weight = next(vision_model(model).parameters())
    pixels = torch.cat([image.patches for image in images]).to(weight.device, weight.dtype)
    seen: Tensor
    if is_blip2(model):
        seen = model.get_image_features(pixels, return_dict=True).pooler_output
        return seen
    seen = vision_model(model)(pixel_values=pixels).last_hidden_state
    return model.enc_to_dec_proj(seen) if hasattr(model, "enc_to_dec_proj") else seen


def put_in(embedded: Tensor, is_image: Tensor, seen: Tensor) -> Tensor:
    """``embedded`` (rows, columns, width) with ``seen`` (tokens, width) where ``is_image`` (rows, columns) is true."""
    return embedded.masked_scatter(is_image[..., None], seen.to(embedded.dtype))


def end_ids(model: PreTrainedModel, tokenizer_end: int | None) -> frozenset[int]:
    """Token ids that end a text.

    Of chat models the tokenizer's own token and those of the generation config, as in vLLM; of captioners those of the
    generation config alone, or the one at which BLIP's own ``generate`` ends. Raises BadInput where a captioner names
    none.
    """
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    if not is_captioner(model):
        return frozenset(token for token in [*listed, tokenizer_end] if token is not None)
    if is_blip(model):
        listed = [model.config.text_config.sep_token_id]
    ends = frozenset(token for token in listed if token is not None)
    if not ends:
        raise BadInput(f"{model.name_or_path}: no token ends a caption; write eos_token_id into generation_config.json")
    return ends


def barred_ids(model: PreTrainedModel) -> list[int]:
    """Token ids that are never sampled: those of pixels; of captioners also padding and start tokens, but not ends."""
    barred = vision_ids(model.config)
    if not is_captioner(model):
        return barred
    generation, text = model.generation_config, language_model(model).config
    names = ("pad_token_id", "bos_token_id", "decoder_start_token_id")
    said = [getattr(config, name, None) for config in (generation, text) for name in names]
    suppressed = getattr(generation, "suppress_tokens", None) or []
    all_of_them = {token for token in [*barred, *said, *suppressed] if token is not None and token < text.vocab_size}
    return sorted(all_of_them - end_ids(model, None))


def start_id(model: Any) -> int:
    """The token that a captioner's text begins with. Raises BadInput where its configuration names none."""
    text, generation, whole = language_model(model).config, model.generation_config, model.config
    starts = [text.bos_token_id]
    if not hasattr(whole, "text_config"):
        said = [(config, name) for name in ("decoder_start_token_id", "bos_token_id") for config in (generation, whole)]
        starts = [getattr(config, name, None) for config, name in said]
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise BadInput(
            f"{model.name_or_path}: no token begins a caption; write decoder_start_token_id into config.json"
        )
    return int(start)


class CaptionerAdapter:
    """Code shared by captioners: images of one size, positions on one axis."""

    axes = 1
    needs_mask = True
    shares = True

    def __init__(self, model: Any, image_processor: Any) -> None:
        self._model = model
        self.image_processor = image_processor
        self.lm, self.body = language_model(model), body_of(model)
        self._side = image_size(model)

    def prepare_image(self, image: ImageInput) -> PreparedImage:
        pixels = rgb_pixels(image)
        if pixels.shape[:2] != (self._side, self._side):
            size = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise RequestError(
                f"image {image.uid} has {size} pixels, and the model looks at {self._side} x {self._side}"
            )
        processed = self.image_processor(images=[pixels], return_tensors="pt")
        return PreparedImage(image.uid, processed["pixel_values"], torch.ones(1, 3, dtype=torch.long))

    def expand(self, ids: Tensor, image: PreparedImage) -> Tensor:
        return ids

    def positions(self, ids: Tensor, image: PreparedImage | None) -> Tensor:
        return torch.arange(len(ids))[None]

    def is_image(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids, dtype=torch.bool)

    def look(self, images: Sequence[PreparedImage]) -> Tensor:
        return encode_images(self._model, images)

    def head(self, hidden: Tensor, product: Product = functional.linear) -> Tensor:
        if not is_blip(self._model):
            return product(hidden, self.lm.lm_head.weight, self.lm.lm_head.bias)
        head = self.lm.cls.predictions
        return product(head.transform(hidden), head.decoder.weight, head.decoder.bias)


class Blip2Adapter(CaptionerAdapter):
    """BLIP-2 with OPT."""

    def expand(self, ids: Tensor, image: PreparedImage) -> Tensor:
        return ids.repeat_interleave(torch.where(self.is_image(ids), int(self._model.config.num_query_tokens), 1))

    def is_image(self, ids: Tensor) -> Tensor:
        mask: Tensor = ids == self._model.config.image_token_id
        return mask

    def new_cache(self) -> Cache:
        return new_cache(self.lm.config, growing=True)

    def vision(
        self, prompts: Sequence[PreparedPrompt], level: Level, seen: Tensor, places: dict[str, int]
    ) -> Tensor | None:
        parts = image_parts(self, prompts, level, places)
        return torch.cat([seen[index, tokens] for index, tokens in parts]) if parts else None

    def inputs(self, ids: Tensor, positions: Tensor, cache: Any, vision: Tensor | None) -> dict[str, Any]:
        embedded = self.lm.get_input_embeddings()(ids)
        if vision is not None:
            embedded = put_in(embedded, self.is_image(ids), vision)
        return {"inputs_embeds": embedded, "position_ids": positions[0]}

    def generate(self, prompt: PreparedPrompt, config: GenerationConfig, processors: LogitsProcessorList) -> Any:
        return _generate(self._model, prompt, prompt.ids, "input_ids", config, processors)


class EncoderDecoderAdapter(CaptionerAdapter):
    """Encoder-decoders. Tokens depend on the image from the first on, so prompts share nothing."""

    shares = False

    def new_cache(self) -> Cache:
        return CrossCache(self.lm.config)

    def vision(self, prompts: Sequence[PreparedPrompt], level: Level, seen: Tensor, places: dict[str, int]) -> Tensor:
        images = [prompts[segment.of].image for segment in level]
        return seen[[places[image.uid] for image in images if image is not None]]

    def inputs(self, ids: Tensor, positions: Tensor, cache: Any, vision: Tensor | None) -> dict[str, Any]:
        if vision is None:
            vision = cache.seen.expand(len(ids), -1, -1)  # their keys and values are cached, these are not read
        else:
            cache.seen = vision[:1]
        return {"input_ids": ids, "position_ids": positions[0], "encoder_hidden_states": vision, **self.mode}

    @property
    def mode(self) -> dict[str, bool]:
        """BLIP's body is an encoder by default."""
        return {"is_decoder": True} if is_blip(self._model) else {}

    def generate(self, prompt: PreparedPrompt, config: GenerationConfig, processors: LogitsProcessorList) -> Any:
        if is_blip(self._model):  # it drops the last token, as its tokenizer ends every text
            ended = torch.cat([prompt.ids, prompt.ids[:1]])
            return _generate(self._model, prompt, ended, "input_ids", config, processors)
        config.decoder_start_token_id = int(prompt.ids[0])
        return _generate(self._model, prompt, prompt.ids, "decoder_input_ids", config, processors)


def _generate(
    model: Any, prompt: PreparedPrompt, ids: Tensor, name: str, config: GenerationConfig, processors: Any
) -> Any:
    assert prompt.image is not None  # the encoder refuses prompts without one
    weight = next(vision_model(model).parameters())
    pixels = prompt.image.patches.to(weight.device, weight.dtype)
    inputs = {"pixel_values": pixels, name: ids[None].to(weight.device)}
    return model.generate(**inputs, generation_config=config, logits_processor=processors)
