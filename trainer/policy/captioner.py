"""What the policies of captioners that are no chat models (BLIP-2, encoder-decoders) have in common."""

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
    """A policy that looks at pictures of one size, each distinct one once.

    The dropout that these models came with is off: captions are sampled without it, and log-probabilities that differ
    from those of sampling would be taken for a policy that has changed.
    """

    def __init__(self, model: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        no_dropout(model)

    def attend(self, implementation: str) -> None:
        language_model(self.model).config._attn_implementation = implementation

    @property
    def base(self) -> Any:
        """The text decoder without its head."""
        return body_of(self.model)

    def look(self, prompts: Sequence[PreparedPrompt]) -> Tensor:
        """What the text of each prompt is written from (prompts, tokens, width), each distinct image seen once."""
        images = [prompt.image for prompt in prompts if prompt.image is not None]
        assert len(images) == len(prompts)  # no prompt without an image is prepared
        distinct: dict[str, PreparedImage] = {image.uid: image for image in images}
        trains = any(weight.requires_grad for weight in _before_text(self.model))
        with nullcontext() if trains else torch.no_grad():
            seen = encode_images(self.model, list(distinct.values()))
        places = {uid: place for place, uid in enumerate(distinct)}
        chosen = torch.tensor([places[image.uid] for image in images], device=seen.device)
        return seen.index_select(0, chosen)  # gradients of an image seen twice add up in one order, see decoder.pick


def _before_text(model: Any) -> Iterator[nn.Parameter]:
    """All weights that are none of the text decoder's."""
    own = {id(weight) for weight in language_model(model).parameters()}
    return (weight for weight in model.parameters() if id(weight) not in own)


def parts_of(model: Any) -> dict[str, list[nn.Parameter]]:
    """The weights of a captioner by part; the projector is all between vision encoder and text (a Q-Former, too)."""
    vision = list(vision_model(model).parameters())
    encoder = {id(weight) for weight in vision}
    projector = [weight for weight in _before_text(model) if id(weight) not in encoder]
    return {"vision": vision, "projector": projector, "llm": list(language_model(model).parameters())}


def no_dropout(model: nn.Module) -> None:
    """Turn off, in place, the dropout of modules and of whole layers; an adapter's own stays."""
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)


def whole_logps(policy: CaptionerPolicy, prompt: PreparedPrompt, tokens: Sequence[int], name: str) -> Tensor:
    """The slow twin: log-probabilities (tokens,) of one completion by the model's own forward pass.

    ``name``: what that calls the ids of its text.
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
