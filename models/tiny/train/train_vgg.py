"""Training of a small VGG to classify the nine cells; its convolutions are features for comparing images.

:mod:`...scorers.vgg` reads the folder: widths and "M" as torchvision's ``make_layers`` takes them, weights under
torchvision's names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.vgg import make_layers

from ...bundled import resolve
from ..world.render import render
from ..world.scenes import MOST_THINGS, PLACES, sample_of, scenes
from .architectures import written
from .batches import IGNORE, SIGN_SHARE, Truth, truth_of
from .schedule import Schedule
from .training_loop import TrainingLoop
from .vision import SlotReader, reading_loss

CONFIG: dict[str, Any] = {
    "model_type": "vgg",
    "layers": [16, 16, "M", 32, 32, "M", 64, 64, "M"],
    "image_size": 64,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
TOP = 64  # channels of the last layer
KINDS = ("what", "color", "size")


@dataclass(frozen=True)
class FeaturesPlan(Schedule):
    """``images`` per step."""

    images: int = 32
    workers: int = 1


@dataclass(frozen=True)
class LabelledImages:
    """Images (n, image_size, image_size, 3) uint8 and their labels, without signs' words, which are too small."""

    pixels: Tensor
    truth: Truth


class LabelledBatches(Dataset[LabelledImages]):
    """``self[step]``: the batch of that step, a function of (seed, step) only."""

    def __init__(self, plan: FeaturesPlan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> LabelledImages:
        rng = Random(f"features:{self.plan.seed}:{step}")
        shown = [sample_of("train", rng, MOST_THINGS, SIGN_SHARE) for _ in range(self.plan.images)]
        return LabelledImages(
            pictures([render(scene, rng, CONFIG["image_size"]) for scene in shown]), asked(truth_of(shown))
        )


def pictures(images: Sequence[Any]) -> Tensor:
    """PIL images of one size -> (n, height, width, 3) uint8."""
    return torch.from_numpy(np.stack([np.array(image) for image in images]))


def asked(truth: Truth) -> Truth:
    """``truth`` without the words on signs."""
    return replace(truth, word=torch.full_like(truth.word, IGNORE))


def levels(pixels: Tensor) -> Tensor:
    """(n, side, side, 3) uint8 -> (n, 3, side, side) from -1 to 1."""
    return (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


class Classifier(nn.Module):
    """VGG's ``features``, and a head that classifies each cell from their mean and maximum in it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = make_layers(CONFIG["layers"], batch_norm=False)
        self.classifier = SlotReader(2 * TOP)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, seen: Tensor) -> list[Tensor]:
        """(n, 3, side, side) from -1 to 1 -> logits as :class:`SlotReader` gives them."""
        features = self.features(seen)
        pooled = [pool(features, 3).flatten(2) for pool in (nn.functional.adaptive_avg_pool2d, _largest)]
        logits: list[Tensor] = self.classifier(torch.cat(pooled, dim=1).mT)
        return logits


def _largest(features: Tensor, cells: int) -> Tensor:
    return nn.functional.adaptive_max_pool2d(features, cells)


class FeaturesTrainer(TrainingLoop[LabelledImages]):
    """Trainer of the classifier."""

    def __init__(self, plan: FeaturesPlan) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.model = plan, Classifier()
        super().__init__(plan, self.model, nn.Identity())

    def batches(self) -> Iterator[LabelledImages]:
        yield from DataLoader(
            LabelledBatches(self.plan),
            batch_size=None,
            sampler=range(self.progress.step, self.plan.steps),
            num_workers=self.plan.workers,
            prefetch_factor=8 if self.plan.workers else None,
        )

    def step(self, batch: LabelledImages, rate: float) -> dict[str, float]:
        loss, read = reading_loss(self.model(levels(batch.pixels)), batch.truth)
        report = {"loss": loss.item(), **dict(zip(KINDS, read, strict=False)), "background": read[-1]}
        return {**report, "norm": self.update(loss, rate)}

    def export(self, folder: Path) -> None:
        weights = {key: value.detach().half().contiguous() for key, value in self.model.state_dict().items()}
        with written(folder) as temporary:
            save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
            (temporary / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: str) -> Classifier:
    """The exported net with its head, in float32."""
    model = Classifier().eval()
    weights = load_file(Path(folder) / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model


@torch.inference_mode()
def accuracies(model: Classifier, count: int, seed: int = 1) -> dict[str, float]:
    """Accuracies over the cells of ``count`` held-out scenes, by question."""
    shown = list(scenes("heldout", count, seed))
    seen = levels(pictures([render(scene, Random(f"{seed}:{at}"), 64) for at, scene in enumerate(shown)]))
    _, read = reading_loss(model(seen), asked(truth_of(shown)))
    return {**dict(zip(KINDS, read, strict=False)), "background": read[-1]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure a feature net's own classifier on held-out scenes.")
    parser.add_argument("folder", help="an exported net, or tiny/vgg")
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args(arguments)
    print(
        json.dumps(
            {"cells": args.scenes * len(PLACES), **accuracies(load_classifier(resolve(args.folder)), args.scenes)}
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
