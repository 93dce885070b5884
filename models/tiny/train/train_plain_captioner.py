"""Training of the plain captioners and the language model on web-style captions.

The vision encoders are pretrained, so captions begin at once; auxiliary heads that read the nine cells preserve their
features and are not exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import Blip2ForImageTextRetrieval, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ...bundled import resolve
from ...pretrained import load_weights
from ..world.captions import dense_caption, short_caption
from ..world.scenes import MOST_THINGS, PLACES, sample_of
from .batches import IGNORE, SIGN_SHARE, Truth, picture, truth_of
from .dual_encoder import WIDTH
from .plain_models import build_blip2, build_opt, build_vit_gpt2, export_plain, special_ids
from .schedule import Schedule
from .texts.web_captions import plain_caption
from .texts.word_tokenizer import build_word_tokenizer
from .train_clip_itm import normalised
from .training_loop import TrainingLoop
from .vision import CellReader, SlotReader, reading_loss

LENGTHS = (8, 14, 24, 1_000_000)  # tokens at most per group; captions are padded to their group's longest


@dataclass(frozen=True)
class PlainPlan(Schedule):
    """``images`` per step with ``texts`` captions each; the language model reads ``images * texts`` captions."""

    images: int = 32
    texts: int = 3
    reading_weight: float = 0.3
    workers: int = 1


@dataclass(frozen=True)
class PlainBatch:
    """Captions as token ids from BOS to EOS; ``owners``: image indexes into ``pixels`` (n, SIDE, SIDE, 3) uint8."""

    texts: list[list[int]]
    owners: list[int]
    pixels: Tensor
    truth: Truth


class PlainBatches(Dataset[PlainBatch]):
    """``self[step]``: the batch of that step, a function of (seed, step) only; without images unless ``sees``."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, plan: PlainPlan, sees: bool) -> None:
        self.tokenizer, self.plan, self.sees = tokenizer, plan, sees

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> PlainBatch:
        rng = Random(f"plain:{self.plan.seed}:{step}")
        most = min(MOST_THINGS, 2 + step // 50)
        scenes = [sample_of("train", rng, most, SIGN_SHARE) for _ in range(self.plan.images)]
        owners = [owner for owner in range(self.plan.images) for _ in range(self.plan.texts)]
        tellings = (plain_caption,) if self.sees else (plain_caption, short_caption, dense_caption)
        texts = [rng.choice(tellings)(scenes[owner], rng) for owner in owners]
        pixels = np.stack([picture(scene, rng) for scene in scenes]) if self.sees else np.zeros(0, np.uint8)
        ids = self.tokenizer(texts, add_special_tokens=False).input_ids
        special = special_ids(self.tokenizer)
        ids = [[special["bos_token_id"], *tokens, special["eos_token_id"]] for tokens in ids]
        return PlainBatch(ids, owners, torch.from_numpy(pixels), truth_of(scenes))


class PlainTrainer(TrainingLoop[PlainBatch]):
    """Base trainer on captions. Subclasses define the image features and the next-token logits."""

    sees = True

    def __init__(
        self, plan: PlainPlan, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, reader: nn.Module
    ) -> None:
        super().__init__(plan, model, reader)
        self.plan, self.tokenizer, self.model, self.reader = plan, tokenizer, model, reader

    def batches(self) -> Iterator[PlainBatch]:
        yield from DataLoader(
            PlainBatches(self.tokenizer, self.plan, self.sees),
            batch_size=None,
            sampler=range(self.progress.step, self.plan.steps),
            num_workers=self.plan.workers,
            prefetch_factor=8 if self.plan.workers else None,
        )

    def step(self, batch: PlainBatch, rate: float) -> dict[str, float]:
        seen = self.see(normalised(batch.pixels)) if self.sees else None
        caption_loss, report = self.captions(seen, batch)
        loss = caption_loss
        if seen is not None:
            reading, read = reading_loss(self.reader(self.read(seen)), batch.truth)
            report |= {"reading": reading.item(), "cells": sum(read[:4]) / 4}
            loss = caption_loss + self.plan.reading_weight * reading
        return {**report, "norm": self.update(loss, rate)}

    def captions(self, seen: Tensor | None, batch: PlainBatch) -> tuple[Tensor, dict[str, float]]:
        """The mean cross entropy of the captions' tokens, and the token accuracy."""
        groups = [next(at for at, longest in enumerate(LENGTHS) if len(ids) <= longest) for ids in batch.texts]
        losses, right, count = [], 0.0, 0
        for group in range(len(LENGTHS)):
            chosen = [at for at, own in enumerate(groups) if own == group]
            if not chosen:
                continue
            ids = padded([batch.texts[at] for at in chosen])
            about = None if seen is None else seen[[batch.owners[at] for at in chosen]]
            logits = self.logits(about, ids[:, :-1].clamp(min=0))
            known = ids[:, 1:] != IGNORE
            guesses, truth = logits[known], ids[:, 1:][known]
            losses.append(functional.cross_entropy(guesses, truth, reduction="sum"))
            right += (guesses.argmax(-1) == truth).float().sum().item()
            count += len(truth)
        loss = torch.stack(losses).sum() / count
        return loss, {"loss": loss.item(), "accuracy": right / count}

    def see(self, pixels: Tensor) -> Tensor:
        """(n, 3, SIDE, SIDE) -> the language model's image features, (n, tokens, width)."""
        raise NotImplementedError

    def read(self, seen: Tensor) -> Tensor:
        """The part of ``seen`` from which ``self.reader`` reads the cells."""
        raise NotImplementedError

    def logits(self, seen: Tensor | None, ids: Tensor) -> Tensor:
        """Captions' tokens (n, length) -> next-token logits (n, length, vocabulary)."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        export_plain(self.model, self.tokenizer, folder)


class VitGpt2Trainer(PlainTrainer):
    """ViT and GPT-2: the decoder attends to all of the encoder's tokens."""

    def __init__(self, plan: PlainPlan) -> None:
        torch.manual_seed(plan.seed)
        tokenizer = build_word_tokenizer(plan.seed, begin=False)
        super().__init__(plan, tokenizer, build_vit_gpt2(tokenizer, matcher()), CellReader(WIDTH, tokens=0))

    def see(self, pixels: Tensor) -> Tensor:
        states: Tensor = self.model.encoder(pixel_values=pixels).last_hidden_state
        return states

    def read(self, seen: Tensor) -> Tensor:
        return seen[:, 1:]

    def logits(self, seen: Tensor | None, ids: Tensor) -> Tensor:
        memory = self.model.enc_to_dec_proj(seen)
        out: Tensor = self.model.decoder(input_ids=ids, encoder_hidden_states=memory, use_cache=False).logits
        return out


class Blip2Trainer(PlainTrainer):
    """BLIP-2: the queries' outputs precede the caption. The vision encoder is frozen, as in BLIP-2's own training."""

    def __init__(self, plan: PlainPlan) -> None:
        torch.manual_seed(plan.seed)
        tokenizer = build_word_tokenizer(plan.seed, begin=True)
        read = load_weights(OPTForCausalLM, resolve("tiny/opt"), dtype=torch.float32, called="tiny/opt")
        model = build_blip2(tokenizer, matcher(), read)
        model.vision_model.requires_grad_(False)
        super().__init__(plan, tokenizer, model, SlotReader(WIDTH))

    def see(self, pixels: Tensor) -> Tensor:
        states = self.model.vision_model(pixel_values=pixels).last_hidden_state
        queries = self.model.query_tokens.expand(len(pixels), -1, -1)
        out: Tensor = self.model.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state
        return out

    def read(self, seen: Tensor) -> Tensor:
        return seen[:, : len(PLACES)]

    def logits(self, seen: Tensor | None, ids: Tensor) -> Tensor:
        assert seen is not None
        image = self.model.language_projection(seen)
        embedded = torch.cat((image, self.model.get_input_embeddings()(ids)), dim=1)
        out: Tensor = self.model.language_model(inputs_embeds=embedded, use_cache=False).logits
        return out[:, image.shape[1] :]


class OptTrainer(PlainTrainer):
    """The language model: captions in all wordings of the captioners, without images."""

    sees = False

    def __init__(self, plan: PlainPlan) -> None:
        torch.manual_seed(plan.seed)
        tokenizer = build_word_tokenizer(plan.seed, begin=True)
        super().__init__(plan, tokenizer, build_opt(tokenizer), nn.Identity())

    def logits(self, seen: Tensor | None, ids: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return out


PLAIN: dict[str, Any] = {"vit-gpt2": VitGpt2Trainer, "blip2": Blip2Trainer, "opt": OptTrainer}


def matcher() -> Blip2ForImageTextRetrieval:
    """``tiny/itm`` in float32. Raises ValueError if its weights are missing."""
    folder = resolve("tiny/itm")
    model: Blip2ForImageTextRetrieval = load_weights(
        Blip2ForImageTextRetrieval, folder, dtype=torch.float32, called="tiny/itm"
    )
    return model


def padded(rows: Sequence[list[int]]) -> Tensor:
    """Rows as a tensor (rows, longest), right-padded with IGNORE."""
    width = max(map(len, rows))
    return torch.tensor([row + [IGNORE] * (width - len(row)) for row in rows])
