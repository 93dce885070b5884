"""Recall at k: retrieval of a caption's own image from a gallery, with a CLIP that was neither reward nor filter.

Also the cosine of captions with their own images, with any such model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ...manifests.shards import Row
from ...models.images.decode import EVERYTHING, ImageLimits, Pixels
from ...models.images.formats import ImageProblem
from ...models.images.preprocess import decode_preprocessed
from ...models.scorers.blip_contrastive import BlipScorer
from ...models.scorers.clip import ClipScorer

BATCH = 64
TEXTS = 1024  # captions compared with the gallery at a time
LIMITS = ImageLimits(min_side=1, accept=EVERYTHING)  # of images, which were valid for the stage that captioned them


Scorer = ClipScorer | BlipScorer


@dataclass(frozen=True)
class Gallery:
    """Distinct images: ``names`` (uids) and unit vectors ``(n, width)``, float32."""

    names: Sequence[str]
    features: Tensor


def gallery_of(rows: Iterable[Row], wanted: set[str], clip: Scorer) -> Gallery:
    """Decodable images of ``rows`` with a ``wanted`` uid, without repeats."""
    names: list[str] = []
    parts: list[Tensor] = []
    for batch in _in_batches(_decoded(rows, wanted, clip)):
        names += [name for name, _ in batch]
        parts.append(clip.encode_images([pixels for _, pixels in batch]))
    return Gallery(names, torch.cat(parts) if parts else torch.empty(0, 0))


def _decoded(rows: Iterable[Row], wanted: set[str], clip: Scorer) -> Iterator[tuple[str, Pixels]]:
    left = set(wanted)
    for row in rows:
        if row.uid in left and row.image is not None:
            left.discard(row.uid)
            views = decode_preprocessed(row.image, preprocesses=(clip.preprocess,), limits=LIMITS)
            if not isinstance(views, ImageProblem):
                yield row.uid, views[0]


def _in_batches(images: Iterator[tuple[str, Pixels]]) -> Iterator[list[tuple[str, Pixels]]]:
    while batch := list(islice(images, BATCH)):
        yield batch


def ranks_of(gallery: Gallery, captions: Iterable[tuple[str, str]], clip: Scorer) -> dict[tuple[str, str], int]:
    """Rank of the image (1 is the best) in the gallery sorted by cosine to the caption, by image and caption.

    Ties count against it: a caption that fits all images equally retrieves none. Captions of images outside the gallery
    have no rank.
    """
    by_pair: dict[tuple[str, str], int] = {}
    for batch, vectors, own in _asked(gallery, captions, clip):
        by_pair |= zip(batch, ranks(vectors @ gallery.features.T, own), strict=True)
    return by_pair


def cosines_of(gallery: Gallery, captions: Iterable[tuple[str, str]], scorer: Scorer) -> dict[tuple[str, str], float]:
    """Cosine, in [-1, 1], by image and caption; images outside the gallery are left out."""
    by_pair: dict[tuple[str, str], float] = {}
    for batch, vectors, own in _asked(gallery, captions, scorer):
        by_pair |= zip(batch, (vectors * gallery.features[own]).sum(-1).tolist(), strict=True)
    return by_pair


def _asked(
    gallery: Gallery, captions: Iterable[tuple[str, str]], scorer: Scorer
) -> Iterator[tuple[list[tuple[str, str]], Tensor, Tensor]]:
    """Batches of distinct captions of the gallery's images: captions, vectors (n, width), image indices (n,)."""
    where = {name: number for number, name in enumerate(gallery.names)}
    asked = [(image, text) for image, text in dict.fromkeys(captions) if image in where]
    for batch in (asked[start : start + TEXTS] for start in range(0, len(asked), TEXTS)):
        vectors = scorer.encode_texts([text for _, text in batch])
        yield batch, vectors, torch.tensor([where[image] for image, _ in batch], device=vectors.device)


def ranks(similarity: Tensor, own: Tensor) -> list[int]:
    """Rank (from 1, ties against it) of each text's own image ``(texts,)`` in ``similarity`` (texts, images)."""
    of_own = similarity.gather(1, own[:, None])
    places: list[int] = (similarity >= of_own).sum(1).tolist()
    return places
