"""Common base of policies for captioners that are not chat models (BLIP-2, encoder-decoders)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...models.engines.hf.captioner_adapter import body_of, encode_images, language_model, vision_model
from ...models.engines.hf.model_adapter import PreparedImage, PreparedPrompt
from .decoder import DecoderPolicy


class CaptionerPolicy(DecoderPolicy):
    """A policy for images of a fixed size, each distinct image encoded once.

    The models' own dropout is off: captions are sampled without it, and different log-probabilities would look like a
    changed policy.
    """

    def __init__(self, model: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        no_dropout(model)

    def attend(self, implementation: str) -> None:
        language_model(self.model).config._attn_implementation = implementation

    @property
    def base(self) -> Any:
        """Text decoder without its head."""
        return body_of(self.model)

    def look(self, prompts: Sequence[PreparedPrompt]) -> Tensor:
        """Image embeddings of each prompt, (prompts, tokens, width); each distinct image is encoded once."""
        images = [prompt.image for prompt in prompts if prompt.image is not None]
        assert len(images) == len(prompts)  # no prompt without an image is prepared
        distinct: dict[str, PreparedImage] = {image.uid: image for image in images}
        trains = any(weight.requires_grad for weight in _before_text(self.model))
        with nullcontext() if trains else torch.no_grad():
            seen = encode_images(self.model, list(distinct.values()))
        places = {uid: index for index, uid in enumerate(distinct)}
        chosen = torch.tensor([places[image.uid] for image in images], device=seen.device)
        return seen.index_select(0, chosen)  # deterministic sum of a repeated image's gradients, see decoder.pick


def _before_text(model: Any) -> Iterator[nn.Parameter]:
    """All weights except the text decoder's."""
    own = {id(weight) for weight in language_model(model).parameters()}
    return (weight for weight in model.parameters() if id(weight) not in own)


def parts_of(model: Any) -> dict[str, list[nn.Parameter]]:
    """Weights of a captioner by part; the projector is everything between vision encoder and text (also a Q-Former)."""
    vision = list(vision_model(model).parameters())
    encoder = {id(weight) for weight in vision}
    projector = [weight for weight in _before_text(model) if id(weight) not in encoder]
    return {"vision": vision, "projector": projector, "llm": list(language_model(model).parameters())}


def no_dropout(model: nn.Module) -> None:
    """Turn off dropout and layer dropout in place, except an adapter's dropout."""
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)


def whole_logps(policy: CaptionerPolicy, prompt: PreparedPrompt, tokens: Sequence[int], name: str) -> Tensor:
    """Slow reference: log-probabilities (tokens,) of one completion from the model's own forward pass.

    ``name``: the forward pass's argument for the text's ids.
    """
    assert prompt.image is not None
    model, device = policy.model, policy.device
    ids = torch.cat([prompt.ids, torch.tensor(tokens)])[None].to(device)
    weight = next(vision_model(model).parameters())
    inputs = {"pixel_values": prompt.image.patches.to(weight.device, weight.dtype), name: ids}
    logits = model(**inputs).logits[0, len(prompt.ids) - 1 : -1].float() / policy.temperature
    logps = logits.index_fill(1, policy.get_buffer("banned"), float("-inf")).log_softmax(dim=-1)
    chosen: Tensor = logps.gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0]
    return chosen
