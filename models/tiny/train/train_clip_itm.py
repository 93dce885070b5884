"""Training of the bundled CLIPs and the image-text matching model on true texts and hard negatives.

As for the captioner, the vision encoder first learns the contents of the nine cells, and so do the vectors that texts
are compared with: without that, twenty minutes taught them colours and backgrounds but neither places nor shapes. Then
texts follow: sentences before whole captions, which hold many facts at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from open_clip import CLIP
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import BertTokenizer, Blip2ForImageTextRetrieval

from ...scorers.clip import encode_trimmed
from ..world.scenes import MOST_THINGS, PLACES, sample_of
from .batches import SIGN_SHARE, Truth, picture, truth_of
from .dual_encoder import (
    CONTEXT,
    EMBED,
    QUERIES,
    WIDTH,
    build_bert_tokenizer,
    build_clip,
    build_itm,
    export_clip,
    export_itm,
)
from .schedule import Schedule
from .texts.hard_negatives import addition, sentence_pair, true_and_false, with_sentence
from .training_loop import TrainingLoop
from .vision import MEAN, STD, CellReader, SlotReader, reading_loss

SLOT = 64  # dimensions per cell that a CLIP's vector is projected to
CAPTION_SHARE = 3  # the matching model reads the captions of one image in three
ADDED_SHARE = 0.25  # share of the false texts with a sentence about an absent thing


@dataclass(frozen=True)
class ClipItmPlan(Schedule):
    """``images`` per step, each with a caption and ``sentences`` true sentences, and as many false texts."""

    images: int = 32
    sentences: int = 2
    reading_steps: int = 500  # of the vision encoder alone
    captions_from: float = 0.3  # share of the training; before it, texts are sentences
    reading_weight: float = 0.3


@dataclass(frozen=True)
class PairBatch:
    """Images (n, SIDE, SIDE, 3) uint8 with token ids: captions (n, length) and sentences (n * s, length).

    ``false_*``: the same texts with an error in each.
    """

    pixels: Tensor
    truth: Truth
    captions: Tensor
    false_captions: Tensor
    sentences: Tensor
    false_sentences: Tensor


class PairBatches(Dataset[PairBatch]):
    """``self[step]``: the batch of that step, a function of (seed, step) only."""

    def __init__(self, tokenizer: BertTokenizer, plan: ClipItmPlan) -> None:
        self.tokenizer, self.plan = tokenizer, plan

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> PairBatch:
        rng = Random(f"pairs:{self.plan.seed}:{step}")
        most = min(MOST_THINGS, 2 + step // 150)
        scenes = [sample_of("train", rng, most, SIGN_SHARE) for _ in range(self.plan.images)]
        captions, sentences = [], []
        for scene in scenes:
            text, false = true_and_false(scene, rng)
            added = rng.random() < ADDED_SHARE
            captions.append((text, with_sentence(text, addition(scene, rng), rng)[0] if added else false))
            for _ in range(self.plan.sentences):
                text, false = sentence_pair(scene, rng)
                added = rng.random() < ADDED_SHARE
                sentences.append((text, addition(scene, rng) if added else false))
        ids = [self._ids([pair[side] for pair in pairs]) for pairs in (captions, sentences) for side in (0, 1)]
        pixels = np.stack([picture(scene, rng) for scene in scenes])
        return PairBatch(torch.from_numpy(pixels), truth_of(scenes), *ids)

    def _ids(self, texts: list[str]) -> Tensor:
        ids: Tensor = self.tokenizer(
            texts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
        ).input_ids
        return ids


def normalised(pixels: Tensor) -> Tensor:
    """(n, SIDE, SIDE, 3) uint8 -> (n, 3, SIDE, SIDE) float, normalised as by the models' own transforms."""
    return ((pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


class ClipItmTrainer(TrainingLoop[PairBatch]):
    """Base trainer of the CLIPs and the matching model. Subclasses define the losses."""

    model: Any

    def __init__(self, plan: ClipItmPlan, tokenizer: BertTokenizer, slot: int, *more: nn.Module) -> None:
        self.plan, self.tokenizer = plan, tokenizer
        self.readers = nn.ModuleList([CellReader(WIDTH, tokens=0), SlotReader(slot), *more])
        super().__init__(plan, self.model, self.readers)

    def batches(self) -> Iterator[PairBatch]:
        yield from DataLoader(
            PairBatches(self.tokenizer, self.plan),
            batch_size=None,
            sampler=range(self.progress.step, self.plan.steps),
            num_workers=1,
            prefetch_factor=8,
        )

    def step(self, batch: PairBatch, rate: float) -> dict[str, float]:
        """One update of all weights; returns losses and accuracies by name."""
        pooled, tokens = self.see(normalised(batch.pixels))
        tower, whole_image, *_ = self.readers
        loss, read = reading_loss(tower(tokens), batch.truth)
        slot_loss, kept = reading_loss(whole_image(self.slots(pooled)), batch.truth)
        report = {"reading": loss.item(), "cells": sum(read[:4]) / 4, "kept": sum(kept[:4]) / 4}
        loss = loss + slot_loss
        if self.progress.step >= self.plan.reading_steps:
            whole = self.plan.progress(self.progress.step, self.progress.seconds) >= self.plan.captions_from
            text_loss, figures = self.losses(pooled, tokens, batch, whole)
            loss = self.plan.reading_weight * loss + text_loss
            report |= figures
        report["norm"] = self.update(loss, rate)
        return report

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, SIDE, SIDE) -> the vision encoder's output, and its patch tokens (n, patches, WIDTH)."""
        raise NotImplementedError

    def slots(self, pooled: Tensor) -> Tensor:
        """Features of each of the nine cells, (n, 9, slot width), from the vectors that texts are compared with."""
        raise NotImplementedError

    def losses(self, pooled: Tensor, tokens: Tensor, batch: PairBatch, whole: bool) -> tuple[Tensor, dict[str, float]]:
        """The loss over texts; ``whole``: captions too."""
        raise NotImplementedError


class ClipTrainer(ClipItmTrainer):
    """Contrastive training: each caption with its image among the batch's, false texts as additional negatives."""

    model: CLIP

    def __init__(self, name: str, plan: ClipItmPlan) -> None:
        torch.manual_seed(plan.seed)
        tokenizer = build_bert_tokenizer(plan.seed)
        self.name, self.model = name, build_clip(name, tokenizer)
        self.model.visual.output_tokens = True
        super().__init__(plan, tokenizer, SLOT, nn.Linear(EMBED, len(PLACES) * SLOT))

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pooled, tokens = self.model.visual(pixels)
        return functional.normalize(pooled, dim=-1), tokens

    def encode(self, ids: Tensor) -> Tensor:
        """Token ids (texts, length) -> unit vectors (texts, EMBED)."""
        return functional.normalize(encode_trimmed(self.model, ids), dim=-1)

    def scale(self) -> Tensor:
        """Logit scale of the cosines."""
        scale: Tensor = self.model.logit_scale
        return scale.exp().clamp(max=100)

    def slots(self, pooled: Tensor) -> Tensor:
        unfolded: Tensor = self.readers[2](pooled * EMBED**0.5)
        return unfolded.view(-1, len(PLACES), SLOT)

    def losses(self, pooled: Tensor, tokens: Tensor, batch: PairBatch, whole: bool) -> tuple[Tensor, dict[str, float]]:
        loss, figures = self.of_sentences(pooled, self.encode(batch.sentences), self.encode(batch.false_sentences))
        if whole:
            more, extra = self.of_captions(pooled, self.encode(batch.captions), self.encode(batch.false_captions))
            loss, figures = loss + more, figures | extra
        return loss, figures | {"loss": loss.item()}

    def of_sentences(self, pooled: Tensor, true: Tensor, false: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics from vectors of images (n, EMBED) and of the sentences about each, grouped by image."""
        scale = self.scale()
        owners = torch.arange(len(pooled)).repeat_interleave(len(true) // len(pooled))
        right, wrong = ((pooled[owners] * texts).sum(-1) for texts in (true, false))
        loss = functional.softplus(scale * (wrong - right)).mean()
        among = scale * true @ pooled.T  # other images may fit a sentence as well, hence the small weight
        loss = loss + 0.3 * functional.cross_entropy(among, owners)
        return loss, {"sentences": (right > wrong).float().mean().item(), "scale": scale.item()}

    def of_captions(self, pooled: Tensor, true: Tensor, false: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics from vectors of images and of a caption about each, (n, EMBED)."""
        n, here = len(pooled), torch.arange(len(pooled))
        logits = self.scale() * pooled @ torch.cat((true, false)).T
        loss = functional.cross_entropy(logits, here) + functional.cross_entropy(logits[:, :n].T, here)
        twins = logits.diagonal() > logits[:, n:].diagonal()
        figures = {
            "captions": twins.float().mean().item(),
            "recall": (logits.argmax(-1) == here).float().mean().item(),
        }
        return loss, figures

    def export(self, folder: Path) -> None:
        export_clip(self.name, self.model, self.tokenizer, folder)


class ItmTrainer(ClipItmTrainer):
    """Image-text matching as binary classification of pairs."""

    model: Blip2ForImageTextRetrieval

    def __init__(self, plan: ClipItmPlan) -> None:
        torch.manual_seed(plan.seed)
        tokenizer = build_bert_tokenizer(plan.seed)
        self.model = build_itm(tokenizer)
        super().__init__(plan, tokenizer, WIDTH)

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states = self.model.vision_model(pixel_values=pixels).last_hidden_state
        return states, states[:, 1:]

    def slots(self, pooled: Tensor) -> Tensor:
        queries = self.model.query_tokens.expand(len(pooled), -1, -1)
        out: Tensor = self.model.qformer(query_embeds=queries, encoder_hidden_states=pooled).last_hidden_state
        return out[:, : len(PLACES)]

    def losses(self, pooled: Tensor, tokens: Tensor, batch: PairBatch, whole: bool) -> tuple[Tensor, dict[str, float]]:
        n, s = len(pooled), self.plan.sentences
        owners = torch.arange(n).repeat_interleave(s)
        yes, no = self._logits(pooled, batch.sentences, owners), self._logits(pooled, batch.false_sentences, owners)
        loss = functional.softplus(-yes).mean() + functional.softplus(no).mean()
        figures = {"sentences": (yes > no).float().mean().item()}
        if whole:
            some = n // CAPTION_SHARE  # captions are long and cost the most
            here = torch.arange(some)
            right, false, others = (
                self._logits(pooled, ids[:some], here)
                for ids in (batch.captions, batch.false_captions, batch.captions.roll(1, 0))
            )
            loss = loss + functional.softplus(-right).mean()
            loss = loss + 0.7 * functional.softplus(false).mean() + 0.3 * functional.softplus(others).mean()
            figures |= {
                "captions": (right > false).float().mean().item(),
                "others": (right > others).float().mean().item(),
            }
        figures["loss"] = loss.item()
        return loss, figures

    def _logits(self, states: Tensor, ids: Tensor, owners: Tensor) -> Tensor:
        """Log odds (texts,) that each text matches its image."""
        queries = self.model.query_tokens.expand(len(ids), -1, -1)
        mask = torch.cat((torch.ones(len(ids), QUERIES, dtype=torch.long), (ids != 0).long()), dim=1)
        embedded = self.model.embeddings(input_ids=ids, query_embeds=queries)
        out = self.model.qformer(
            query_embeds=embedded,
            query_length=QUERIES,
            attention_mask=mask,
            encoder_hidden_states=states[owners],
            encoder_attention_mask=torch.ones(len(ids), states.shape[1], dtype=torch.long),
        ).last_hidden_state
        logits: Tensor = self.model.itm_head(out[:, :QUERIES]).mean(1)
        return logits[:, 1] - logits[:, 0]

    def export(self, folder: Path) -> None:
        export_itm(self.model, self.tokenizer, folder)
