"""Image-text scorers: code shared by CLIP and matching models, and caption scores by sentence.

A scorer works on batches composed by its caller. Sums in another order differ in their last bits, so the same scores
again need the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import BadInput
from ..engines.plain_text import PlainText
from ..images.decode import Pixels
from ..images.preprocess import Preprocess
from .sentences import split_sentences

TOKENS_PER_BATCH = 4096  # of texts encoded together; enough to keep a core's caches and a GPU busy


class Pair(NamedTuple):
    """A text to score against the ``image``-th image of a batch."""

    image: int
    text: str


def distinct_texts(pairs: Sequence[Pair]) -> dict[str, int]:
    """The distinct texts of ``pairs``, numbered by first occurrence."""
    return {text: number for number, text in enumerate(dict.fromkeys(pair.text for pair in pairs))}


class PairScorer(Protocol):
    """Scores pairs of an image and a text. ``name``: prefix of its columns."""

    name: str

    def encode_images(self, pixels: Sequence[npt.NDArray[Any]]) -> Tensor:
        """Vision encoder output (n, ...) for n distinct images, in the form that it reads."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Any:
        """Tokenizer output for texts. The model takes no part: another thread can tokenize while one computes."""
        ...

    def score(self, images: Tensor, pairs: Sequence[Pair], tokens: Any = None) -> list[float]:
        """How well each text fits its image, higher is better; texts are truncated to what the model reads.

        ``tokens``: the result of ``tokenize`` for ``distinct_texts(pairs)``, where that was done before.
        """
        ...


class Scorer(PairScorer, Protocol):
    """A scorer of pixels. ``preprocess``: how they are made of an image."""

    preprocess: Preprocess


def device_and_type(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype; ``auto``: the first GPU in bfloat16, or a CPU in float32. Raises BadInput"""
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if dtype == "auto":
        return where, torch.bfloat16 if where.type == "cuda" else torch.float32
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise BadInput(f"dtype {dtype!r} is none of auto, {', '.join(types)}")
    return where, types[dtype]


def computing_threads(devices: Iterable[torch.device], most: int) -> tuple[int, int]:
    """Number of batches to compute at a time, at most ``most``, and of torch threads for each.

    On a CPU, batches computed side by side avoid the synchronisation of torch's threads at the end of every layer;
    small models gain a good part of a core. A separate device is kept busy by one thread.
    """
    cores = torch.get_num_threads()
    beside = max(1, min(most, cores)) if all(device.type == "cpu" for device in devices) else 1
    return beside, max(1, cores // beside)


def normalised(
    pixels: Sequence[Pixels], mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """n images (height, width, 3) uint8 -> (n, 3, height, width), moved as bytes and normalised on the device."""
    batch = torch.from_numpy(np.stack(pixels)).to(device)
    levels = batch.permute(0, 3, 1, 2).to(torch.float32) / 255
    shift, scale = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return ((levels - shift) / scale).to(dtype).contiguous()


def by_length(lengths: Sequence[int], budget: int = TOKENS_PER_BATCH) -> list[list[int]]:
    """Indices in batches of similar lengths, each at most ``budget`` tokens when padded (or one text)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def cosines(images: Tensor, texts: Tensor, pairs: Sequence[Pair]) -> list[float]:
    """Cosine of each pair, from unit vectors (images, width) and (texts, width), ordered as by ``distinct_texts``."""
    numbers = distinct_texts(pairs)
    shown = images[torch.tensor([pair.image for pair in pairs], device=images.device)]
    said = texts[torch.tensor([numbers[pair.text] for pair in pairs], device=images.device)]
    scores: list[float] = (shown * said).sum(-1).tolist()
    return scores


def padded(ids: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Token ids of n texts as (n, longest) int64, right-padded with ``fill``, and the mask of non-padding tokens.

    transformers' own padding builds tensors from nested lists number by number: a tenth of the time of a small model.
    """
    lengths = np.array([len(tokens) for tokens in ids])
    out = np.full((len(ids), int(lengths.max())), fill, dtype=np.int64)
    for row, tokens in zip(out, ids, strict=True):
        row[: len(tokens)] = tokens
    mask = np.arange(out.shape[1]) < lengths[:, None]
    return torch.from_numpy(out), torch.from_numpy(mask.astype(np.int64))


@dataclass(frozen=True)
class PlainCleaning:
    """One of open_clip's text cleaning functions, followed by ``plain``, which breaks up spellings of tokens."""

    clean: Callable[[str], str]
    plain: PlainText

    def __call__(self, text: str) -> str:
        return self.plain(self.clean(text))


def cleaned(clean: Callable[[str], str], text: str) -> str:
    """``clean(text)``, one of open_clip's functions, without ftfy where it has nothing to fix: in plain ASCII.

    ftfy takes most of the time, and looks for broken encodings, entities and control characters.
    """
    from open_clip.tokenizer import canonicalize_text, get_clean_fn, whitespace_clean

    if isinstance(clean, PlainCleaning):
        return clean.plain(cleaned(clean.clean, text))
    if not (text.isascii() and text.isprintable()) or "&" in text:
        return clean(text)
    if clean is get_clean_fn("whitespace"):
        return str(whitespace_clean(text))
    if clean is get_clean_fn("lower"):
        return str(whitespace_clean(text)).lower()
    return str(canonicalize_text(text.strip())) if clean is get_clean_fn("canonicalize") else clean(text)


# --- captions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionScore:
    """``score``: of the caption, truncated to what the model reads.

    ``mean``, ``least``: over its sentences; ``lowest``: the index of the sentence with the least.
    """

    score: float
    mean: float
    least: float
    lowest: int

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.score, self.mean, self.least)))


@dataclass(frozen=True)
class AskedCaptions:
    """Distinct ``pairs`` to score, and for each caption the indices of its own pair and of its sentences'."""

    pairs: list[Pair]
    parts: list[list[int]]


def ask_captions(captions: Sequence[tuple[int, str]]) -> AskedCaptions:
    """Pairs of ``(image, caption)``; a caption must have at least one sentence: callers filter out empty ones."""
    wanted = [[Pair(image, text), *(Pair(image, part) for part in split_sentences(text))] for image, text in captions]
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pair for pairs in wanted for pair in pairs))}
    return AskedCaptions(list(numbers), [[numbers[pair] for pair in pairs] for pairs in wanted])


def score_asked(
    scorer: PairScorer, pixels: Sequence[npt.NDArray[Any]], asked: AskedCaptions, tokens: Any = None
) -> list[CaptionScore]:
    """Scores of the requested captions; every image is encoded once and every distinct pair scored once."""
    scores = scorer.score(scorer.encode_images(pixels), asked.pairs, tokens)
    return [_summary([scores[number] for number in numbers]) for numbers in asked.parts]


def score_captions(scorer: Scorer, pixels: Sequence[Pixels], captions: Sequence[tuple[int, str]]) -> list[CaptionScore]:
    """Scores of ``(image, caption)`` pairs, all steps in one."""
    return score_asked(scorer, pixels, ask_captions(captions))


def _summary(scores: Sequence[float]) -> CaptionScore:
    """Summarise scores: the whole caption's, first, and its sentences'."""
    parts: npt.NDArray[np.float64] = np.asarray(scores[1:], dtype=np.float64)
    return CaptionScore(scores[0], float(parts.mean()), float(parts.min()), int(parts.argmin()))
