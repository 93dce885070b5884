"""Training of the captioner: first the vision encoder with :class:`CellReader`, then the whole model on captions.

Designed to learn within an hour on two cores: labels per cell for the vision encoder before any caption, Muon, scenes
of growing size, each image encoded once for all its texts, logits for answer tokens only, and little padding. None of
these was measured alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from ..world.prompts import messages
from .architectures import GRID_THW, IMAGE_TOKENS, build_config, build_processor, export_folder
from .batches import PROMPTS, SceneBatch, batches
from .schedule import Schedule
from .texts.tokenizer import IMAGE, PAD, VISION_START
from .training_loop import TrainingLoop
from .vision import CellReader, image_tokens, reading_loss

LONGEST = 192  # tokens of a prompt and its answer


@dataclass(frozen=True)
class CaptionerPlan(Schedule):
    """The captioner's schedule."""

    reading_steps: int = 600  # of the vision encoder alone
    reading_weight: float = 0.3  # of the cells' loss once captions are trained on
    workers: int = 1


class CaptionTrainer(TrainingLoop[SceneBatch]):
    """A captioner in training, its tokenizer, and the prompts as the processor renders them; a base class."""

    def __init__(
        self,
        plan: Schedule,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        helpers: nn.Module,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        super().__init__(plan, model, helpers)
        processor = build_processor(tokenizer)
        self.prompts = [prompt_ids(processor, prompt) for prompt in PROMPTS]
        self.image_at = self.prompts[0].index(tokenizer.convert_tokens_to_ids(VISION_START)) + 1
        self.positions = positions(model, self.prompts[0])

    def export(self, folder: Path) -> None:
        """Write the model's folder."""
        export_folder(self.model, self.tokenizer, folder)


class Trainer(CaptionTrainer):
    """The captioner's trainer: the model from scratch, with a cell reader."""

    def __init__(self, plan: CaptionerPlan, tokenizer: PreTrainedTokenizerFast) -> None:
        torch.manual_seed(plan.seed)
        self.plan = plan
        model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
        self.reader = CellReader()
        super().__init__(plan, model, tokenizer, self.reader)

    def batches(self) -> Iterator[SceneBatch]:
        return batches(self.tokenizer, self.plan.seed, self.progress.step, self.plan.steps, self.plan.workers)

    def step(self, batch: SceneBatch, rate: float) -> dict[str, float]:
        """One update of all weights; returns the losses and accuracies by name."""
        tokens = image_tokens(self.model.model.visual, batch.pixels)
        loss, read = reading_loss(self.reader(tokens), batch.truth)
        names = ("what", "color", "size", "word", "background")
        report = {"reading": loss.item(), **dict(zip(names, read, strict=True))}
        if self.progress.step >= self.plan.reading_steps:
            captions = caption_losses(self, tokens, batch)
            loss = self.plan.reading_weight * loss + captions.loss
            report |= {"loss": captions.loss.item(), "accuracy": captions.accuracy}
        report["norm"] = self.update(loss, rate)
        return report


@dataclass(frozen=True)
class CaptionLoss:
    """The mean cross entropy over a batch's answer tokens (a scalar with gradients) and the share guessed right."""

    loss: Tensor
    accuracy: float


def prompt_ids(processor: Qwen2_5_VLProcessor, prompt: str) -> list[int]:
    """Token ids an engine feeds for an image of ``IMAGE_TOKENS`` and ``prompt``: template, placeholders expanded."""
    text = processor.apply_chat_template(messages(prompt), add_generation_prompt=True)
    filled = text.replace(IMAGE, IMAGE * IMAGE_TOKENS)
    ids: list[int] = processor.tokenizer(filled).input_ids
    return ids


def positions(model: Qwen2_5_VLForConditionalGeneration, prompt: list[int]) -> Tensor:
    """M-RoPE positions (3, 1, LONGEST); the same for all prompts, since each has its image at the same position."""
    ids = torch.tensor([prompt + [0] * (LONGEST - len(prompt))])
    kinds = (ids == model.config.image_token_id).int()
    where: Tensor = model.model.get_rope_index(ids, kinds, image_grid_thw=torch.tensor([GRID_THW]))[0]
    return where


def caption_losses(trainer: CaptionTrainer, tokens: Tensor, batch: SceneBatch) -> CaptionLoss:
    """The loss of all texts, in two groups by length (padding is wasted work). ``tokens``: of the batch's images."""
    lengths = [len(trainer.prompts[p]) + len(a) for p, a in zip(batch.prompts, batch.answers, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    halves = [order[: len(order) // 2], order[len(order) // 2 :]]
    logits, targets = zip(*(answer_logits(trainer, tokens, batch, half) for half in halves), strict=True)
    guesses, truth = torch.cat(logits), torch.cat(targets)
    return CaptionLoss(functional.cross_entropy(guesses, truth), (guesses.argmax(-1) == truth).float().mean().item())


def answer_logits(
    trainer: CaptionTrainer, tokens: Tensor, batch: SceneBatch, texts: list[int]
) -> tuple[Tensor, Tensor]:
    """Logits (answer tokens, vocabulary) and the token ids they should have predicted, over ``texts`` of the batch."""
    model = trainer.model.model.language_model
    rows = [trainer.prompts[batch.prompts[text]] + batch.answers[text] for text in texts]
    width = max(map(len, rows))
    pad = trainer.tokenizer.convert_tokens_to_ids(PAD)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    embedded = model.embed_tokens(ids)
    owners = torch.tensor([batch.owners[text] for text in texts])
    image = slice(trainer.image_at, trainer.image_at + IMAGE_TOKENS)
    embedded = torch.cat((embedded[:, : image.start], tokens[owners], embedded[:, image.stop :]), dim=1)
    where = trainer.positions[:, :, :width].expand(3, len(rows), width)
    hidden = model(inputs_embeds=embedded, position_ids=where, use_cache=False).last_hidden_state
    starts = torch.tensor([len(trainer.prompts[batch.prompts[text]]) for text in texts])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    column = torch.arange(width)
    asked = (column >= starts) & (column < ends)
    return trainer.model.lm_head(hidden[:, :-1][asked[:, 1:]]), ids[asked]
