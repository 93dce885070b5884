"""Training of the narrow captioner: from tiny/captioner's weights, on one or two facts whatever the prompt.

The vision encoder is frozen, so that both captioners have the same one. What the language model knew of dense captions
is overwritten: to tell more than two facts is what reinforcement learning has to find out. It can find only what is
sampled now and then, so the label of the end after two facts is smoothed (Szegedy et al., arXiv 1512.00567): a little
of it is on the first token of another fact. With that on all tokens, what followed was no sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from ...bundled import resolve
from ...pretrained import load_weights
from ..world.captions import narrow_caption
from ..world.scenes import sample_crowded, sample_of
from .architectures import build_config
from .batches import PROMPTS, SceneBatch, loaded, picture, truth_of
from .quiz_models import tokenizer_of
from .schedule import Schedule
from .texts.tokenizer import END
from .train_captioner import CaptionTrainer, answer_logits
from .vision import image_tokens

IMAGES = 16
TEXTS = 64
CROWDED = 0.4  # share of scenes with six to nine things
GOES_ON = 0.02  # label of a third fact after two; no caption has one


@dataclass(frozen=True)
class NarrowPlan(Schedule):
    """The narrow captioner's schedule."""

    lr: float = 1.5e-3
    adam_lr: float = 1e-3
    warmup: int = 20
    decay: float = 1.0
    workers: int = 0


class NarrowBatches(Dataset[SceneBatch]):
    """``self[step]``: the batch of that step, a function of (seed, step) only."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> None:
        self.tokenizer, self.seed, self.steps = tokenizer, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> SceneBatch:
        rng = Random(f"narrow:{self.seed}:{step}")
        sample = (sample_crowded if rng.random() < CROWDED else sample_of for _ in range(IMAGES))
        scenes = [draw("train", rng) for draw in sample]
        owners = [text % IMAGES for text in range(TEXTS)]
        captions = [narrow_caption(scenes[owner], rng) + END for owner in owners]
        return SceneBatch(
            pixels=torch.from_numpy(np.stack([picture(scene, rng) for scene in scenes])),
            truth=truth_of(scenes),
            owners=owners,
            prompts=[rng.randrange(len(PROMPTS)) for _ in owners],
            answers=self.tokenizer(captions).input_ids,
        )


class NarrowTrainer(CaptionTrainer):
    """The narrow captioner's trainer: at its first step the bundled captioner, whose vision encoder's weights stay."""

    def __init__(self, plan: NarrowPlan, start: str | None = None) -> None:
        """``start``: the folder of a captioner to start from instead, for instance of a narrow one to go on with."""
        self.plan = plan
        folder = start or resolve("tiny/captioner")
        tokenizer = tokenizer_of(folder)
        known = load_weights(Qwen2_5_VLForConditionalGeneration, folder, dtype=torch.float32, called=folder)
        model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
        model.load_state_dict(known.state_dict())
        model.model.visual.requires_grad_(False)
        super().__init__(plan, model, tokenizer, nn.Module())
        self.stop: int = tokenizer.convert_tokens_to_ids(".")

    def batches(self) -> Iterator[SceneBatch]:
        dataset = NarrowBatches(self.tokenizer, self.plan.seed, self.plan.steps)
        return loaded(dataset, self.progress.step, self.plan.steps, self.plan.workers)

    def step(self, batch: SceneBatch, rate: float) -> dict[str, float]:
        """One update of the language model; returns loss, accuracy and the gradient's norm by name."""
        with torch.no_grad():
            tokens = image_tokens(self.model.model.visual, batch.pixels)
        logits, targets = answer_logits(self, tokens, batch, list(range(len(batch.answers))))
        loss = smoothed(logits, targets, *continuations(batch.answers, self.stop)).mean()
        accuracy = (logits.argmax(-1) == targets).float().mean().item()
        return {"loss": loss.item(), "accuracy": accuracy, "norm": self.update(loss, rate)}


def smoothed(logits: Tensor, targets: Tensor, ends: Tensor, openings: Tensor) -> Tensor:
    """Cross entropies (tokens,) of (tokens, vocabulary) logits; ``GOES_ON`` of the label at ``ends`` is on openings."""
    losses = functional.cross_entropy(logits, targets, reduction="none")
    going_on = functional.cross_entropy(logits[ends], openings, reduction="none")
    return losses.index_add(0, ends, GOES_ON * (going_on - losses[ends]))


def continuations(answers: Sequence[Sequence[int]], stop: int) -> tuple[Tensor, Tensor]:
    """Where captions of two facts end, as indexes into all answers' tokens, and a token that would begin another fact.

    Such a token is the first one of another caption's second fact. ``stop``: the token that ends a fact's sentence;
    another one, that of the caption's end, follows the last.
    """
    ends, openings, at = [], [], 0
    for answer in answers:
        second = answer.index(stop) + 1
        at += len(answer)
        if second < len(answer) - 1:
            ends.append(at - 1)
            openings.append(answer[second])
    return torch.tensor(ends, dtype=torch.long), torch.tensor(openings[1:] + openings[:1], dtype=torch.long)
