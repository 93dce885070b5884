"""How well scorers tell true captions from false ones.

``python -m capipe.models.tiny.train.eval.scorers --scenes 1000``

On held-out scenes, dense captions with one error planted in each. Prints a JSON object: the area under the ROC curve
by kind of error, and how often the sentence with the error is the lowest-scored one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import numpy as np

from ....images.decode import ImageLimits, Pixels
from ....images.formats import ImageProblem
from ....images.preprocess import decode_preprocessed
from ....scorers.base import CaptionScore, Scorer, score_captions
from ....scorers.loading import ScorerConfig, load_scorer
from ....scorers.sentences import split_sentences
from ...world.captions import dense_caption
from ...world.corpus import CorpusSample, samples
from ..texts.hard_negatives import Planted, plant_addition, plant_change

BATCH = 50
MEASURES = ("score", "mean", "least")


@dataclass(frozen=True)
class Subject:
    """An image with its true caption, another scene's caption, and two captions with a planted error."""

    sample: CorpusSample
    true: str
    other: str
    changed: Planted
    added: Planted


@dataclass(frozen=True)
class Detection:
    """Detection of one kind of error: areas under the ROC curve by measure, and the share of errors located.

    ``lowest``: share of the captions with several sentences whose lowest-scored sentence is the one with the error.
    """

    auc: dict[str, float]
    lowest: float | None = None


def area_under_roc(true: Sequence[float], false: Sequence[float]) -> float:
    """Probability that a true caption scores above a false one, ties counting half (Hanley and McNeil, 1982)."""
    pooled = np.concatenate([true, false])
    _, inverse, counts = np.unique(pooled, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    above = ranks[: len(true)].sum() - len(true) * (len(true) + 1) / 2
    return float(above / (len(true) * len(false)))


def subjects(count: int, seed: int) -> list[Subject]:
    """Held-out scenes and their captions, the same for the same arguments."""
    shown = list(samples(count, "heldout", seed))
    result = []
    for index, sample in enumerate(shown):
        rng = Random(f"detect:{seed}:{index}")
        other = shown[(index + 1 + rng.randrange(count - 1)) % count]
        true, others = (dense_caption(item.scene, rng) for item in (sample, other))
        result.append(Subject(sample, true, others, plant_change(sample.scene, rng), plant_addition(sample.scene, rng)))
    return result


def detections(scorer: Scorer, of: Sequence[Subject]) -> dict[str, Detection]:
    """Detection by kind of error, over all subjects."""
    scores: dict[str, list[CaptionScore]] = {"true": [], "other": [], "changed": [], "added": []}
    for start in range(0, len(of), BATCH):
        batch = of[start : start + BATCH]
        pixels = [seen_by(scorer, subject.sample.image) for subject in batch]
        for kind, caption_scores in scores.items():
            texts = [getattr(subject, kind) for subject in batch]
            asked = [(i, text.text if isinstance(text, Planted) else text) for i, text in enumerate(texts)]
            caption_scores += score_captions(scorer, pixels, asked)
    return {
        kind: Detection(
            {name: _auc(scores["true"], caption_scores, name) for name in MEASURES},
            None if kind == "other" else _found([getattr(subject, kind) for subject in of], caption_scores),
        )
        for kind, caption_scores in scores.items()
        if kind != "true"
    }


def seen_by(scorer: Scorer, image: bytes) -> Pixels:
    """The pixels that a scorer makes of a rendered image."""
    views = decode_preprocessed(image, preprocesses=(scorer.preprocess,), limits=ImageLimits())
    if isinstance(views, ImageProblem):
        raise ValueError(f"a rendered scene cannot be decoded: {views.reason}")
    return views[0]


def _auc(true: Sequence[CaptionScore], false: Sequence[CaptionScore], name: str) -> float:
    values = ([getattr(score, name) for score in scores] for scores in (true, false))
    return round(area_under_roc(*values), 4)


def _found(planted: Sequence[Planted], scores: Sequence[CaptionScore]) -> float:
    several = [(p, s) for p, s in zip(planted, scores, strict=True) if len(split_sentences(p.text)) > 1]
    return round(sum(error.sentence == score.lowest for error, score in several) / len(several), 4)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--clip", default="tiny/clip")
    parser.add_argument("--itm", default="tiny/itm")
    options = parser.parse_args(arguments)
    of = subjects(options.scenes, options.seed)
    report: dict[str, Any] = {"scenes": options.scenes, "seed": options.seed}
    for kind, model in (("clip", options.clip), ("itm", options.itm)):
        result = detections(load_scorer(ScorerConfig(kind, model)), of)
        report[kind] = {"model": model, **{error: asdict(detection) for error, detection in result.items()}}
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
