"""A transformers model that answers many prompts at once: each distinct prompt is computed once for all its samples.

Works for causal language models and for the Qwen-VL family (Qwen2-VL, 2.5, 3), whose rotary positions have three axes
(time, height, width). Positions are always computed here and passed: without them these models fall back to plain
ones in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from .engine import ImageInput, Prompt, RequestError, Sampling
from .prompting import PromptEncoder, rgb_pixels
from .sampling import apply, fold_seed

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel


@dataclass(frozen=True)
class PreparedImage:
    """``patches``: ``(patches, patch values)``; ``grid``: ``(1, 3)`` its time, height and width in patches."""

    uid: str
    patches: Tensor
    grid: Tensor


@dataclass(frozen=True)
class PreparedPrompt:
    """``ids``: ``(length,)`` with the image placeholder repeated; ``positions``: ``(axes, length)``.

    ``next_position``: where the first generated token stands, on every axis.
    """

    ids: Tensor
    positions: Tensor
    next_position: int
    image: PreparedImage | None


@dataclass
class Prefix:
    """Computed prompts, left-padded to a common length. Decoding uses the cache up.

    ``logits``: float32 ``(prompts, vocab)`` after the last token; ``mask``: ``(prompts, length)``, 0 on padding.
    """

    logits: Tensor
    cache: DynamicCache
    mask: Tensor
    next_positions: Tensor
    lengths: list[int]


@dataclass(frozen=True)
class Row:
    """One completion to decode: ``prompt`` is its index in the :class:`Prefix`."""

    prompt: int
    sampling: Sampling
    logprobs: bool


@dataclass
class Drawn:
    """What a row drew. ``stopped``: an end-of-turn token is the last one; otherwise the length limit was met."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


class BatchedLM:
    """The model-facing half of the transformers engine: synchronous, for one thread at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: BaseImageProcessor | None,
        encoder: PromptEncoder,
        end_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self._model = model
        self._image_processor = image_processor
        self.encoder = encoder
        self._end_ids = end_ids
        self._max_model_len = max_model_len
        # Duck-typed, as the classes of the family have no common base.
        self._base: Any = model.base_model
        self._has_axes = hasattr(self._base, "get_rope_index")

    def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """Everything about one prompt that needs no model. Raises RequestError, also for one that is too long."""
        ids = torch.tensor(self.encoder.encode(prompt))
        image = None if prompt.image is None else self._prepare_image(prompt.image)
        if image is not None:
            merged = int(image.grid.prod()) // self._base.config.vision_config.spatial_merge_size**2
            is_image = ids == self._model.config.image_token_id
            ids = ids.repeat_interleave(torch.where(is_image, merged, 1))
        if len(ids) >= self._max_model_len:
            raise RequestError(f"the prompt's {len(ids)} tokens leave no room to answer in {self._max_model_len}")
        positions = self._positions(ids, image)
        return PreparedPrompt(ids, positions, int(positions.max()) + 1, image)

    def _prepare_image(self, image: ImageInput) -> PreparedImage:
        assert self._image_processor is not None  # the encoder refuses images to models without one
        made = self._image_processor(images=[rgb_pixels(image)], return_tensors="pt")
        return PreparedImage(image.uid, made["pixel_values"], made["image_grid_thw"])

    def _positions(self, ids: Tensor, image: PreparedImage | None) -> Tensor:
        if not self._has_axes:
            return torch.arange(len(ids))[None]
        kinds = (ids == self._model.config.image_token_id).int()
        grid = None if image is None else image.grid
        positions: Tensor = self._base.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grid)[0]
        return positions[:, 0]

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[PreparedPrompt]) -> Prefix:
        """Compute each prompt once, in one padded batch; each distinct image goes through the vision tower once."""
        length, device = max(len(prompt.ids) for prompt in prompts), self._model.device
        axes = prompts[0].positions.shape[0]
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = torch.zeros(len(prompts), length, dtype=torch.long)
        positions = torch.zeros(axes, len(prompts), length, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            at = length - len(prompt.ids)
            ids[row, at:], mask[row, at:], positions[:, row, at:] = prompt.ids, 1, prompt.positions
        cache = DynamicCache(config=self._model.config.get_text_config())
        mask = mask.to(device)
        logits = self._forward(ids.to(device), mask, positions.to(device), cache, **self._vision(prompts))
        next_positions = torch.tensor([prompt.next_position for prompt in prompts], device=device)
        return Prefix(logits, cache, mask, next_positions, [len(prompt.ids) for prompt in prompts])

    def _vision(self, prompts: Sequence[PreparedPrompt]) -> dict[str, Any]:
        images = [prompt.image for prompt in prompts if prompt.image is not None]
        if not images:
            return {}
        distinct = {image.uid: image for image in images}
        patches = torch.cat([image.patches for image in distinct.values()]).to(self._model.device)
        grids = torch.cat([image.grid for image in distinct.values()]).to(self._model.device)
        seen = self._base.get_image_features(patches, grids, return_dict=True)
        order = [list(distinct).index(image.uid) for image in images]
        seen.pooler_output = tuple(seen.pooler_output[index] for index in order)
        if getattr(seen, "deepstack_features", None) is not None:  # Qwen3-VL feeds several layers of the tower
            seen.deepstack_features = [tuple(layer[index] for index in order) for layer in seen.deepstack_features]
        return {"mm_encoder_outputs": {"image": seen}}

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, **vision: Any) -> Tensor:
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions if self._has_axes else positions[0],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **vision,
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits

    @torch.inference_mode()
    def decode(self, prefix: Prefix, rows: Sequence[Row]) -> list[Drawn]:
        """Draw every row to its end; rows leave the batch as they finish."""
        drawn = [Drawn() for _ in rows]
        limits = [min(row.sampling.max_tokens, self._max_model_len - prefix.lengths[row.prompt]) for row in rows]
        alive = list(range(len(rows)))
        picker = _Picker([row.sampling for row in rows], self._model.device)
        at = torch.tensor([row.prompt for row in rows], device=self._model.device)
        logits, mask, positions = prefix.logits[at], prefix.mask[at], prefix.next_positions[at]
        prefix.cache.batch_select_indices(at)
        while True:
            tokens = picker.pick(logits, alive, len(drawn[alive[0]].token_ids))
            scores = _scores(logits, tokens) if any(rows[row].logprobs for row in alive) else None
            for index, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
                drawn[row].token_ids.append(token)
                drawn[row].stopped = token in self._end_ids
                if scores is not None:
                    drawn[row].logprobs.append(scores[index])
            going = [
                index
                for index, row in enumerate(alive)
                if not drawn[row].stopped and len(drawn[row].token_ids) < limits[row]
            ]
            if not going:
                return drawn
            if len(going) < len(alive):
                kept = torch.tensor(going, device=self._model.device)
                prefix.cache.batch_select_indices(kept)
                tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
                alive = [alive[index] for index in going]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            axes = 3 if self._has_axes else 1
            logits = self._forward(tokens[:, None], mask, positions.expand(axes, -1)[..., None], prefix.cache)
            positions = positions + 1

    @torch.inference_mode()
    def generate_reference(self, prompt: PreparedPrompt, sampling: Sampling) -> Drawn:
        """The slow twin of prefill and decode: ``generate`` of transformers, one prompt, nothing shared or padded."""
        device = self._model.device
        ids = prompt.ids[None].to(device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.image is not None:
            inputs["pixel_values"] = prompt.image.patches.to(device)
            inputs["image_grid_thw"] = prompt.image.grid.to(device)
            inputs["mm_token_type_ids"] = (ids == self._model.config.image_token_id).int()
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(sampling.max_tokens, self._max_model_len - len(prompt.ids)),
            eos_token_id=sorted(self._end_ids),
            pad_token_id=min(self._end_ids),
            output_logits=True,
            return_dict_in_generate=True,
        )
        noise = LogitsProcessorList([_ReferenceNoise(len(prompt.ids), sampling)])
        model: Any = self._model
        out = model.generate(**inputs, generation_config=config, logits_processor=noise)
        tokens = out.sequences[0, len(prompt.ids) :]
        scores = _scores(torch.cat(out.logits).float(), tokens)
        return Drawn(tokens.tolist(), scores, stopped=int(tokens[-1]) in self._end_ids)


class _Picker:
    """The next token of each row: the argmax, after noise where a row samples."""

    def __init__(self, samplings: list[Sampling], device: torch.device) -> None:
        self._greedy = all(each.temperature == 0 for each in samplings)
        self._cut = any(each.top_p < 1 for each in samplings)
        self._seeds = torch.tensor([fold_seed(each.seed) for each in samplings], device=device)
        self._temperatures = torch.tensor([each.temperature for each in samplings], device=device)
        self._top_ps = torch.tensor([each.top_p for each in samplings], device=device)

    def pick(self, logits: Tensor, rows: list[int], position: int) -> Tensor:
        """Tokens ``(rows,)`` from ``logits`` ``(rows, vocab)``; all rows have drawn ``position`` tokens so far."""
        if self._greedy:
            return logits.argmax(dim=-1)
        at = torch.tensor(rows, device=logits.device)
        positions = torch.full_like(at, position)
        top_ps = self._top_ps[at] if self._cut else None
        return apply(logits, self._seeds[at], positions, self._temperatures[at], top_ps).argmax(dim=-1)


class _ReferenceNoise(LogitsProcessor):
    """The same noise, for transformers' own loop."""

    def __init__(self, prompt_length: int, sampling: Sampling) -> None:
        self._prompt_length = prompt_length
        self._sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sampling, device = self._sampling, scores.device
        position = torch.tensor([input_ids.shape[1] - self._prompt_length], device=device)
        seed = torch.tensor([fold_seed(sampling.seed)], device=device)
        temperature = torch.tensor([sampling.temperature], device=device)
        return apply(scores, seed, position, temperature, torch.tensor([sampling.top_p], device=device))


def _scores(logits: Tensor, tokens: Tensor) -> list[float]:
    """Log-probability of each row's token under the untempered model."""
    scores: list[float] = logits.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0].tolist()
    return scores
