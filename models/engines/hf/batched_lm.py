"""Batched generation with a transformers model: prefixes that prompts share are computed once for all their samples.

A :class:`~.model_adapter.ModelAdapter` hides what differs between models. Positions are always computed beforehand and
passed: without them models silently fall back to plain ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from ..base import ImageInput, Prompt, Sampling
from ..context import too_long
from ..prompting import PromptEncoder
from ..sampling import apply, fold_seed, gumbel_noise, kernel_runs_on, with_noise
from .captioner_adapter import adapter_of, barred_ids
from .kv_cache import select_rows
from .mixed_precision import head_product
from .model_adapter import PreparedImage, PreparedPrompt
from .prefix_tree import Level, Segment, plan, unshared

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel


NOISE_VALUES, MOST_AHEAD = 1 << 18, 16  # noise computed at once, in values and in tokens; overhead for a small model


@dataclass
class Prefix:
    """Prefilled prompts, padded to a common length, also between tokens. Decoding consumes the cache.

    ``logits``: float32 ``(prompts, vocab)`` after the last token; ``mask``: ``(prompts, length)``, 0 on padding.
    ``lengths``: tokens without padding.
    """

    logits: Tensor
    cache: Cache
    mask: Tensor
    next_positions: Tensor
    lengths: list[int]


@dataclass(frozen=True)
class SequenceRow:
    """One completion to decode: ``prompt`` is its index in the :class:`Prefix`."""

    prompt: int
    sampling: Sampling
    logprobs: bool


@dataclass
class SampledTokens:
    """Tokens sampled for a row. ``stopped``: the last one is an end-of-turn token, else the limit was reached."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


class BatchedLM:
    """The model-facing half of the transformers engine: synchronous, for one thread at a time.

    ``share_prefixes=False`` computes every prompt whole: a slow reference, for tests and benchmarks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: BaseImageProcessor | None,
        encoder: PromptEncoder,
        end_ids: frozenset[int],
        max_model_len: int,
        share_prefixes: bool = True,
    ) -> None:
        self._model = model
        self.family = adapter_of(model, image_processor)
        self.encoder = encoder
        self._end_ids = end_ids
        self.max_model_len = max_model_len
        self.share_prefixes = share_prefixes
        # Autocast dtype, for a model in training whose weights are float32; its head has factors of this type and sums
        # in float32, as the trainer's.
        self.computes_in: torch.dtype | None = None
        self._rounded_head: Tensor | None = None  # the head's matrix in that type, for a batch's tokens
        self._barred = torch.tensor(barred_ids(model), dtype=torch.long, device=model.device)

    def precision(self) -> torch.autocast:
        """The autocast context of a batch; casts of weights are kept for all of its tokens."""
        self._rounded_head = None
        return torch.autocast(self._model.device.type, self.computes_in, enabled=self.computes_in is not None)

    def prepare(self, prompt: Prompt, images: dict[str, PreparedImage] | None = None) -> PreparedPrompt:
        """Everything about one prompt that needs no model. Raises RequestError, also for one that is too long.

        ``images`` caches by uid what was prepared for other prompts of the batch.
        """
        ids = torch.tensor(self.encoder.encode(prompt))
        image = None if prompt.image is None else self._prepare_image(prompt.image, {} if images is None else images)
        if image is not None:
            ids = self.family.expand(ids, image)
        if len(ids) >= self.max_model_len:
            raise too_long(len(ids), self.max_model_len)
        positions = self.family.positions(ids, image)
        return PreparedPrompt(ids, positions, int(positions.max()) + 1, image)

    def _prepare_image(self, image: ImageInput, images: dict[str, PreparedImage]) -> PreparedImage:
        if image.uid not in images:
            images[image.uid] = self.family.prepare_image(image)
        return images[image.uid]

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[PreparedPrompt]) -> Prefix:
        """Compute the prompts, one padded batch per level of their plan; each distinct image is encoded once."""
        device = self._model.device
        seen, places = self._look(prompts)
        cache = self.family.new_cache()
        mask = torch.zeros(1, 0, dtype=torch.long, device=device)
        logits = mask
        for level in self._plan(prompts):
            # A segment without a parent takes over any row, and masks it.
            parents = torch.tensor([segment.parent or 0 for segment in level], device=device)
            follows = torch.tensor([segment.start > 0 for segment in level], device=device)
            if mask.shape[1]:
                select_rows(cache, parents)
            ids, own, positions = _padded(prompts, level)
            mask = torch.cat([mask[parents] * follows[:, None], own.to(device)], dim=1)
            vision = self.family.vision(prompts, level, seen, places)
            logits = self._forward(ids.to(device), mask, positions.to(device), cache, vision=vision)
        next_positions = torch.tensor([prompt.next_position for prompt in prompts], device=device)
        return Prefix(logits, cache, mask, next_positions, [len(prompt.ids) for prompt in prompts])

    def _plan(self, prompts: Sequence[PreparedPrompt]) -> list[Level]:
        if not (self.share_prefixes and self.family.shares) or len(prompts) == 1:
            return unshared([len(prompt.ids) for prompt in prompts])
        numbers: dict[str, int] = {}
        return plan([self._identity(prompt, numbers) for prompt in prompts])

    def _identity(self, prompt: PreparedPrompt, numbers: dict[str, int]) -> list[int]:
        """The prompt's ids with a number unique to its image in place of it: where these agree, so do the positions."""
        if prompt.image is None:
            return prompt.ids.tolist()
        number = numbers.setdefault(prompt.image.uid, -1 - len(numbers))
        return torch.where(self.family.is_image(prompt.ids), number, prompt.ids).tolist()

    def _look(self, prompts: Sequence[PreparedPrompt]) -> tuple[Any, dict[str, int]]:
        """Vision encoder output for the distinct images, and each image's index in it by uid."""
        images = {prompt.image.uid: prompt.image for prompt in prompts if prompt.image is not None}
        seen = self.family.look(list(images.values())) if images else None
        return seen, {uid: index for index, uid in enumerate(images)}

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, vision: Any = None) -> Tensor:
        family = self.family
        inputs = {
            **family.inputs(ids, positions, cache, vision),
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        logits: Tensor
        if self.computes_in is None:
            logits = family.lm(**inputs, logits_to_keep=1).logits[:, -1].float()
            return logits
        hidden = family.body(**inputs).last_hidden_state[:, -1].float()
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 logits would be the largest error of all
            return family.head(hidden, self._head_product)

    def _head_product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._rounded_head is None and self.computes_in is not None:
            self._rounded_head = weight.to(self.computes_in)
        return head_product(hidden, weight, bias, self._rounded_head)

    @torch.inference_mode()
    def decode(
        self,
        prefix: Prefix,
        rows: Sequence[SequenceRow],
        ended: Callable[[int, SampledTokens], None] = lambda row, drawn: None,
    ) -> list[SampledTokens]:
        """Sample every row to its end; rows leave the batch as they finish, and ``ended`` is called for each then."""
        drawn = [SampledTokens() for _ in rows]
        limits = [min(row.sampling.max_tokens, self.max_model_len - prefix.lengths[row.prompt]) for row in rows]
        alive = list(range(len(rows)))
        picker = _Picker([row.sampling for row in rows], self._model.device)
        at = torch.tensor([row.prompt for row in rows], device=self._model.device)
        logits, mask, positions = self._bar(prefix.logits[at]), prefix.mask[at], prefix.next_positions[at]
        select_rows(prefix.cache, at)
        while True:
            tokens = picker.pick(logits, alive, len(drawn[alive[0]].token_ids))
            scores = _scores(logits, tokens) if any(rows[row].logprobs for row in alive) else None
            for index, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
                drawn[row].token_ids.append(token)
                drawn[row].stopped = token in self._end_ids
                if scores is not None:
                    drawn[row].logprobs.append(scores[index])
            going = []
            for index, row in enumerate(alive):
                if drawn[row].stopped or len(drawn[row].token_ids) >= limits[row]:
                    ended(row, drawn[row])
                else:
                    going.append(index)
            if not going:
                self._rounded_head = None
                return drawn
            if len(going) < len(alive):
                kept = torch.tensor(going, device=self._model.device)
                select_rows(prefix.cache, kept)
                tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
                alive = [alive[index] for index in going]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            places = positions.expand(self.family.axes, -1)[..., None]
            logits = self._bar(self._forward(tokens[:, None], mask, places, prefix.cache))
            positions = positions + 1

    def _bar(self, logits: Tensor) -> Tensor:
        """``logits`` (rows, vocab) with -inf for ids that are never sampled, such as those of pixels; in place."""
        return logits.index_fill_(1, self._barred, -math.inf)

    @torch.inference_mode()
    def generate_reference(self, prompt: PreparedPrompt, sampling: Sampling) -> SampledTokens:
        """Slow reference for prefill and decode: ``generate`` of transformers, one prompt, nothing shared or padded."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(sampling.max_tokens, self.max_model_len - len(prompt.ids)),
            eos_token_id=sorted(self._end_ids),
            pad_token_id=min(self._end_ids),
            output_logits=True,
            return_dict_in_generate=True,
        )
        barred = [SuppressTokensLogitsProcessor(self._barred.tolist(), self._model.device)] if len(self._barred) else []
        noise = LogitsProcessorList([*barred, _ReferenceNoise(len(prompt.ids), sampling)])
        out = self.family.generate(prompt, config, noise)
        tokens = out.sequences[0, len(prompt.ids) :]
        scores = _scores(self._bar(torch.cat(out.logits).float()), tokens)
        return SampledTokens(tokens.tolist(), scores, stopped=int(tokens[-1]) in self._end_ids)


def _padded(prompts: Sequence[PreparedPrompt], level: Sequence[Segment]) -> tuple[Tensor, Tensor, Tensor]:
    """A level's ids ``(rows, width)``, mask of the same shape and positions ``(axes, rows, width)``, left-padded."""
    width = max(segment.end - segment.start for segment in level)
    ids = torch.zeros(len(level), width, dtype=torch.long)
    mask = torch.zeros(len(level), width, dtype=torch.long)
    positions = torch.zeros(prompts[0].positions.shape[0], len(level), width, dtype=torch.long)
    for row, segment in enumerate(level):
        prompt, at = prompts[segment.of], width - (segment.end - segment.start)
        ids[row, at:], mask[row, at:] = prompt.ids[segment.start : segment.end], 1
        positions[:, row, at:] = prompt.positions[:, segment.start : segment.end]
    return ids, mask, positions


class _Picker:
    """The next token of each row: the argmax, after adding noise where a row samples. Rows may leave, but not join."""

    def __init__(self, samplings: list[Sampling], device: torch.device) -> None:
        self._greedy = all(sampling.temperature == 0 for sampling in samplings)
        self._cut = any(sampling.top_p < 1 for sampling in samplings)
        self._seeds = torch.tensor([fold_seed(sampling.seed) for sampling in samplings], device=device)
        self._temperatures = torch.tensor([sampling.temperature for sampling in samplings], device=device)
        self._top_ps = torch.tensor([sampling.top_p for sampling in samplings], device=device)
        self._rows: list[int] = []
        self._at = torch.zeros(0, dtype=torch.long)
        self._first = 0
        self._noise = torch.zeros(0)  # (tokens ahead, rows, vocab), from token ``_first`` on

    def pick(self, logits: Tensor, rows: list[int], position: int) -> Tensor:
        """Tokens ``(rows,)`` from ``logits`` ``(rows, vocab)``; all rows have sampled ``position`` tokens so far."""
        if self._greedy:
            return logits.argmax(dim=-1)
        if rows != self._rows:
            self._keep(rows)
        temperatures = self._temperatures[self._at]
        top_ps = self._top_ps[self._at] if self._cut else None
        if kernel_runs_on(logits.device):  # the kernel computes noise while adding it: no need to look ahead
            positions = torch.full_like(self._at, position)
            return apply(logits, self._seeds[self._at], positions, temperatures, top_ps).argmax(dim=-1)
        if not self._first <= position < self._first + len(self._noise):
            self._look_ahead(position, logits.shape[-1])
        return with_noise(logits, self._noise[position - self._first], temperatures, top_ps).argmax(dim=-1)

    def _keep(self, rows: list[int]) -> None:
        if len(self._noise):
            places = {row: index for index, row in enumerate(self._rows)}
            self._noise = self._noise[:, [places[row] for row in rows]]
        self._rows, self._at = list(rows), torch.tensor(rows, device=self._seeds.device)

    def _look_ahead(self, position: int, vocab_size: int) -> None:
        """Precompute the noise of the rows' next tokens: it does not depend on what is sampled."""
        rows, device = len(self._rows), self._seeds.device
        ahead = min(max(1, NOISE_VALUES // (rows * vocab_size)), MOST_AHEAD)
        places = torch.arange(position, position + ahead, device=device).repeat_interleave(rows)
        noise = gumbel_noise(self._seeds[self._at].repeat(ahead), places, vocab_size, device)
        self._first, self._noise = position, noise.unflatten(0, (ahead, rows))


class _ReferenceNoise(LogitsProcessor):
    """The same noise, for transformers' own generation loop."""

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
