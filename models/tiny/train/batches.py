"""Training batches generated on the fly, deterministic per seed and step, so that a resumed run sees the same data.

Images stay uint8 until the trainer needs them; half of them are JPEG-compressed, as images in shards are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from ..world.prompts import DENSE, PLAIN, SHORT, answer
from ..world.render import render
from ..world.scenes import BACKGROUNDS, COLORS, MOST_THINGS, PLACES, SHAPES, SIZES, WORDS, Scene, sample_of
from .architectures import SIDE
from .texts.tokenizer import END

IGNORE = -100
WHAT = ("nothing", *SHAPES, "sign")
PROMPTS = (*DENSE, *PLAIN, *SHORT)
IMAGES = 32
TEXTS = 48  # the first text of every image is dense; the others, on the first images again, are plain or short
SIGN_SHARE = 0.5  # higher than the world's default: words are the hardest to learn


@dataclass(frozen=True)
class Truth:
    """Labels per cell (images, 9): what, color, size, word as indexes, IGNORE for none; background: (images,)."""

    what: Tensor
    color: Tensor
    size: Tensor
    word: Tensor
    background: Tensor


@dataclass(frozen=True)
class SceneBatch:
    """Images (images, SIDE, SIDE, 3) uint8 and texts about them.

    Text ``t`` answers ``PROMPTS[prompts[t]]`` on ``pixels[owners[t]]``.
    """

    pixels: Tensor
    truth: Truth
    owners: list[int]
    prompts: list[int]
    answers: list[list[int]]  # token ids, the end token included


def most_things(step: int) -> int:
    """Curriculum: the maximum number of things per scene grows from two to five over the first steps."""
    return min(MOST_THINGS, 2 + step // 100)


class Batches(Dataset[SceneBatch]):
    """``self[step]``: the batch of that step, a function of (seed, step) only."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> None:
        self.tokenizer, self.seed, self.steps = tokenizer, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> SceneBatch:
        rng = Random(f"batch:{self.seed}:{step}")
        scenes = [sample_of("train", rng, most_things(step), SIGN_SHARE) for _ in range(IMAGES)]
        pixels = np.stack([picture(scene, rng) for scene in scenes])
        owners = [text % IMAGES for text in range(TEXTS)]
        kinds = [DENSE if text < IMAGES else rng.choice((PLAIN, PLAIN, PLAIN, SHORT)) for text in range(TEXTS)]
        prompts = [rng.choice((kind[0], rng.choice(kind))) for kind in kinds]  # the canonical one most often
        captions = [answer(prompt, scenes[owner], rng) + END for prompt, owner in zip(prompts, owners, strict=True)]
        return SceneBatch(
            pixels=torch.from_numpy(pixels),
            truth=truth_of(scenes),
            owners=owners,
            prompts=[PROMPTS.index(prompt) for prompt in prompts],
            answers=self.tokenizer(captions).input_ids,
        )


def picture(scene: Scene, rng: Random) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8; some are rendered larger and downscaled as by the processor, half are decoded JPEGs."""
    size = rng.choice((SIDE, SIDE, SIDE, 2 * SIDE))
    image = render(scene, rng, size)
    if size != SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(80, 95))
        image = Image.open(buffer)
    return np.array(image)


def truth_of(scenes: list[Scene]) -> Truth:
    """Labels of each cell of each scene, as indexes into the world's names."""
    what = torch.zeros(len(scenes), len(PLACES), dtype=torch.long)
    color, size, word = (torch.full_like(what, IGNORE) for _ in range(3))
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            cell = PLACES.index(thing.place)
            what[row, cell] = WHAT.index(thing.shape)
            color[row, cell] = COLORS.index(thing.color)
            size[row, cell] = SIZES.index(thing.size)
        if scene.sign is not None:
            cell = PLACES.index(scene.sign.place)
            what[row, cell] = WHAT.index("sign")
            word[row, cell] = WORDS.index(scene.sign.text)
    backgrounds = [BACKGROUNDS.index(scene.background) for scene in scenes]
    return Truth(what, color, size, word, torch.tensor(backgrounds))


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, first: int, steps: int, workers: int
) -> Iterator[SceneBatch]:
    """Batches ``first`` to ``steps``, prefetched by ``workers`` processes (0: in this one)."""
    return loaded(Batches(tokenizer, seed, steps), first, steps, workers)


def loaded(dataset: Dataset[SceneBatch], first: int, steps: int, workers: int) -> Iterator[SceneBatch]:
    """``dataset[first]`` to ``dataset[steps - 1]``, prefetched by ``workers`` processes (0: in this one)."""
    ahead = 8 if workers else None
    yield from DataLoader(
        dataset, batch_size=None, sampler=range(first, steps), num_workers=workers, prefetch_factor=ahead
    )
