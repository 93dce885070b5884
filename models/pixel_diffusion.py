"""Text-to-image diffusion in pixel space: a pipeline in diffusers' format without an autoencoder, for small images.

diffusers' own text-to-image pipelines all denoise an autoencoder's latents. At 32 or 64 pixels the pixels themselves
are few enough. This module imports diffusers, so only code that generates images imports it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from torch.nn import functional


class PixelDiffusionPipeline(DiffusionPipeline):  # type: ignore[misc,no-any-unimported]
    """Text-conditional diffusion over pixels.

    ``unet``: a UNet2DConditionModel that outputs 3 channels and reads these; its ``sample_size`` is the images' height
    and width. With ``grid`` it also reads, as further channels, the map of :func:`laid_out`, which puts the text states
    of each cell at that cell: a small net learns from it in minutes, and from attention alone in hours. ``scheduler``:
    any of diffusers'; its ``prediction_type`` says what the net predicts, for images with levels in [-1, 1].
    ``text_encoder``: a transformers model whose ``last_hidden_state`` is as wide as the net's ``cross_attention_dim``.
    ``tokenizer``: truncates at its ``model_max_length``; an empty text is the unconditional input of classifier-free
    guidance (Ho and Salimans, 2022), so training drops texts to "".
    """

    def __init__(self, unet: Any, scheduler: Any, text_encoder: Any, tokenizer: Any, grid: int = 0) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(grid=grid)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (n, tokens, width) of n texts and the mask (n, tokens) of non-padding tokens.

        Training takes its conditions from here, too, or with gradients from :func:`encode_texts`.
        """
        return encode_texts(self.text_encoder, self.tokenizer, prompts)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Generate an image for each prompt.

        ``images`` is ``pt`` (n, 3, height, width) or ``np`` (n, height, width, 3), both float in [0, 1], or ``pil``.
        ``generator``: one for all, or one for each prompt, whose image then depends on nothing else, except for float
        rounding. ``guidance_scale`` of 1 is without guidance.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        guided = guidance_scale != 1
        states, mask = self.encode_prompt([*prompts, *([""] * len(prompts))] if guided else prompts)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        noise = _noise((len(prompts), 3, height, width), generator)
        images = noise.to(states.device, states.dtype) * self.scheduler.init_noise_sigma
        places = laid_out(states, mask, self.config.grid, (height, width))
        self.scheduler.set_timesteps(num_inference_steps, device=states.device)
        extra = _taken_by(self.scheduler.step, generator=generator)
        for time in self.progress_bar(self.scheduler.timesteps):
            read = self.scheduler.scale_model_input(torch.cat([images, images]) if guided else images, time)
            read = torch.cat([read, places], dim=1)
            prediction = self.unet(read, time, encoder_hidden_states=states, encoder_attention_mask=mask).sample
            if guided:
                with_text, without = prediction.chunk(2)
                prediction = without + guidance_scale * (with_text - without)
            images = self.scheduler.step(prediction, time, images, **extra).prev_sample
        levels = (images.float() / 2 + 0.5).clamp(0, 1).cpu()
        return ImagePipelineOutput(images=_as(levels, output_type))


def encode_texts(text_encoder: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """States (n, tokens, width) of n texts and the boolean mask (n, tokens) of tokens that count.

    In a text without tokens the padding at the first position counts, since attention needs at least one token.
    """
    asked = tokenizer(
        list(texts), padding=True, padding_side="right", truncation=True, max_length=_longest(tokenizer, text_encoder)
    )
    rows = [row or [tokenizer.pad_token_id] for row in asked.input_ids]
    ids, mask = (torch.tensor(values, device=text_encoder.device) for values in (rows, _first(asked.attention_mask)))
    return text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask.bool()


def laid_out(states: Tensor, mask: Tensor, grid: int, size: tuple[int, int]) -> Tensor:
    """Per-cell text states as a map (n, width, *size), constant within cells; (n, 0, *size) where ``grid`` is 0.

    The states (tokens, width) of each text's last ``grid`` x ``grid`` tokens belong to the cells of an image, from the
    top left on. ``mask`` (n, tokens): non-padding tokens; padding is at the end.
    """
    if not grid:
        return states.new_zeros(len(states), 0, *size)
    cells = grid * grid
    last = mask.sum(1, keepdim=True) - cells + torch.arange(cells, device=mask.device)
    cell_states = states.gather(1, last[:, :, None].expand(-1, -1, states.shape[-1]))
    return functional.interpolate(cell_states.mT.unflatten(2, (grid, grid)), size=size)


def _first(mask: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[1, *row[1:]] for row in mask]


def _longest(tokenizer: Any, text_encoder: Any) -> int:
    return min(int(tokenizer.model_max_length), int(text_encoder.config.max_position_embeddings))


def _noise(shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator)
    return torch.stack([torch.randn(shape[1:], generator=one) for one in generator])


def _taken_by(function: Any, **offered: Any) -> dict[str, Any]:
    taken = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in taken}


def _as(levels: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return levels
    pixels = levels.permute(0, 2, 3, 1).numpy()
    return pixels if output_type == "np" else DiffusionPipeline.numpy_to_pil(pixels)
