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
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from ..base import ImageInput, Prompt, Sampling
from ..context import too_long
from ..prompting import PromptEncoder
from .beam_search import BeamSearch, Step
from .captioner_adapter import adapter_of, barred_ids
from .kv_cache import select_rows
from .logits_processors import LogitsProcessors
from .mixed_precision import head_product
from .model_adapter import PreparedImage, PreparedPrompt
from .prefix_tree import Level, Segment, plan, unshared
from .token_picker import ReferenceNoise, TokenPicker, tempered_logits, token_logprobs
from .token_step import TokenStep, steps_by_token

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel


@dataclass
class Prefix:
    """Prefilled prompts, padded to a common length, also between tokens. Decoding consumes the cache.

    ``logits``: float32 ``(prompts, vocab)`` after the last token; ``mask``: ``(prompts, length)``, 0 on padding.
    ``ids``: each prompt's own, without padding.
    """

    logits: Tensor
    cache: Cache
    mask: Tensor
    next_positions: Tensor
    ids: list[Tensor]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]


@dataclass(frozen=True)
class SequenceRow:
    """One completion to decode: ``prompt`` is its index in the :class:`Prefix`."""

    prompt: int
    sampling: Sampling
    logprobs: bool
    tempered: bool = False  # log-probabilities under the distribution sampled from


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

    def caption_ids(self, text: str) -> list[int]:
        """The ids of a caption as if the model had written it, with the token that ends it.

        That is the tokenizer's own end where it ends the model's texts, as of chat models, else the first that does.
        """
        own = self.encoder.end_id
        return [*self.encoder.text_ids(text), own if own in self._end_ids else min(self._end_ids)]

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
            logits = self.forward(ids.to(device), mask, positions.to(device), cache, vision=vision)
        next_positions = torch.tensor([prompt.next_position for prompt in prompts], device=device)
        return Prefix(logits, cache, mask, next_positions, [prompt.ids for prompt in prompts])

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

    def forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache, vision: Any = None) -> Tensor:
        """Logits (rows, vocab), float32, after the last of ``ids`` (rows, width)."""
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
        """Sample every row to its end; rows leave the batch as they finish, and ``ended`` is called for each then.

        Raises ValueError for rows with different numbers of beams.
        """
        limits = [min(row.sampling.max_tokens, self.max_model_len - prefix.lengths[row.prompt]) for row in rows]
        processors = self._processors(prefix, rows)
        if any(row.sampling.beams > 1 for row in rows):
            return self._search(prefix, rows, limits, processors, ended)
        drawn = [SampledTokens() for _ in rows]
        alive = list(range(len(rows)))
        picker = TokenPicker([row.sampling for row in rows], self._model.device)
        tempering = [row.sampling if row.tempered else None for row in rows]
        logits, following = self._begin(prefix, rows)
        while True:
            logits = self._bar(logits)
            position = len(drawn[alive[0]].token_ids)
            tokens = picker.pick(processors(logits, position), alive, position)
            scores = None
            if any(rows[row].logprobs for row in alive):
                scores = token_logprobs(tempered_logits(logits, [tempering[row] for row in alive]), tokens)
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
            processors.append(tokens)
            if len(going) < len(alive):
                kept = torch.tensor(going, device=self._model.device)
                following.select(kept)
                processors.select(kept)
                tokens, alive = tokens[kept], [alive[index] for index in going]
            logits = following(tokens)

    def _begin(self, prefix: Prefix, rows: Sequence[SequenceRow]) -> tuple[Tensor, NextLogits]:
        """Logits of each row's first token, and what computes those of the following ones."""
        at = torch.tensor([row.prompt for row in rows], device=self._model.device)
        following = NextLogits(self, prefix.cache, prefix.mask, prefix.next_positions)
        following.select(at)
        return prefix.logits[at], following

    def _search(
        self,
        prefix: Prefix,
        rows: Sequence[SequenceRow],
        limits: list[int],
        processors: LogitsProcessors,
        ended: Callable[[int, SampledTokens], None],
    ) -> list[SampledTokens]:
        """:meth:`decode` by beams: every running beam is a row of the cache, and follows the beam that it continues."""
        (width,) = {row.sampling.beams for row in rows}
        search = BeamSearch(limits, width, self._end_ids)
        found = [SampledTokens() for _ in rows]
        logits, following = self._begin(prefix, rows)
        while True:
            step = self._advanced(search, processors, logits)
            for row in step.done:
                best = search.beams[row].finished[0]
                path = best.last.path()
                found[row] = SampledTokens([node.token for node in path], [node.logprob for node in path], best.stopped)
                ended(row, found[row])
            if not len(step.rows):
                return found
            following.select(step.rows)
            processors.select(step.rows)
            processors.append(step.tokens)
            logits = following(step.tokens)

    def _advanced(self, search: BeamSearch, processors: LogitsProcessors, logits: Tensor) -> Step:
        """One step of a search. As in transformers, rules are applied to log-probabilities, which are of all tokens."""
        logprobs = self._bar(processors(logits.log_softmax(dim=-1), search.position))
        return search.advance(logprobs, self._bar(logits))

    def _processors(self, prefix: Prefix, rows: Sequence[SequenceRow]) -> LogitsProcessors:
        prompts = [prefix.ids[row.prompt] for row in rows]
        return LogitsProcessors([row.sampling for row in rows], prompts, sorted(self._end_ids), self._model.device)

    def _bar(self, logits: Tensor) -> Tensor:
        """``logits`` (rows, vocab) with -inf for ids that are never sampled, such as those of pixels; in place."""
        return logits.index_fill_(1, self._barred, -math.inf)

    @torch.inference_mode()
    def generate_reference(self, prompt: PreparedPrompt, sampling: Sampling, tempered: bool = False) -> SampledTokens:
        """Slow reference for prefill and decode: ``generate`` of transformers, one prompt, nothing shared or padded."""
        config = GenerationConfig(
            do_sample=False,
            num_beams=sampling.beams,
            early_stopping=False,
            length_penalty=1.0,
            repetition_penalty=sampling.repetition_penalty,
            no_repeat_ngram_size=sampling.no_repeat_ngram,
            min_new_tokens=sampling.min_tokens,
            max_new_tokens=min(sampling.max_tokens, self.max_model_len - len(prompt.ids)),
            eos_token_id=sorted(self._end_ids),
            pad_token_id=min(self._end_ids),
            output_logits=True,
            return_dict_in_generate=True,
        )
        barred = [SuppressTokensLogitsProcessor(self._barred.tolist(), self._model.device)] if len(self._barred) else []
        noise = LogitsProcessorList([*barred, ReferenceNoise(len(prompt.ids), sampling)])
        out = self.family.generate(prompt, config, noise)
        tokens = out.sequences[0, len(prompt.ids) :]
        if sampling.beams > 1:
            steps = zip(out.logits, out.beam_indices[0].tolist(), tokens, strict=False)  # it goes on beside the best
            logits = torch.stack([step[beam] for step, beam, _ in steps])
        else:
            logits = torch.cat(out.logits)
        samplings = [sampling if tempered else None] * len(tokens)
        scores = token_logprobs(tempered_logits(self._bar(logits.float()), samplings), tokens)
        return SampledTokens(tokens.tolist(), scores, stopped=int(tokens[-1]) in self._end_ids)


class NextLogits:
    """Logits after the newest tokens of a batch, whose prompts are in ``cache``. Rows may leave, repeat or move.

    By :class:`.token_step.TokenStep` where that knows the model, else by the model's own forward pass, the slow twin.
    """

    def __init__(self, lm: BatchedLM, cache: Cache, mask: Tensor, positions: Tensor) -> None:
        """``mask``: (rows, prompt); ``positions``: of each row's first token, (rows,)."""
        self._lm, self._cache, self._positions = lm, cache, positions
        # Where nothing is padded no token needs a mask: each would be checked, and left out.
        self._mask = mask if lm.family.needs_mask or not bool(mask.all()) else None
        decoder = getattr(lm.family.body, "language_model", lm.family.body)
        known = lm.computes_in is None and lm.family.shares and steps_by_token(decoder)
        self._step = TokenStep(decoder, lm.family.axes, positions) if known else None

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (rows,) of indices, in this order; indices may repeat."""
        select_rows(self._cache, rows)
        self._positions = self._positions[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]
        if self._step is not None:
            self._step.select(rows)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(rows, vocab), float32, after ``tokens`` (rows,)."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        if self._step is not None:
            return self._lm.family.head(self._step(tokens, self._mask, self._cache.layers)).float()
        places = self._positions.expand(self._lm.family.axes, -1)[..., None]
        self._positions = self._positions + 1
        return self._lm.forward(tokens[:, None], self._mask, places, self._cache)


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
