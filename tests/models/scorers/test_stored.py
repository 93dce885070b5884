"""Stored embeddings in place of the vision encoder, beside that encoder as their slow twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capipe.models.scorers.base import Pair
from capipe.models.scorers.clip import ClipScorer, load_clip
from capipe.models.scorers.stored import ROUNDING, StoredClip

TEXTS = ["A red circle.", "Two blue squares beside a star.", "nothing of the kind"]


@pytest.fixture(scope="module")
def clip() -> ClipScorer:
    return load_clip("tiny/clip", device="cpu")


def test_cosines_are_those_of_the_encoder_within_the_rounding_of_what_is_stored(clip: ClipScorer) -> None:
    side = clip.preprocess.height
    pixels = [np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8) for seed in range(6)]
    seen = clip.encode_images(pixels)
    stored = StoredClip(clip)
    read = stored.encode_images([vector.numpy().astype(np.float16) for vector in seen])
    assert torch.allclose(read.norm(dim=-1), torch.ones(6)) and stored.width == clip.width == read.shape[1]
    assert 0 < float((read - seen).norm(dim=-1).max()) <= ROUNDING
    pairs = [Pair(image, text) for image in range(6) for text in TEXTS]
    fast, slow = (np.array(clip.score(vectors, pairs)) for vectors in (read, seen))
    assert 0 < np.abs(fast - slow).max() <= ROUNDING
    assert stored.score(read, pairs, stored.tokenize(TEXTS)) == fast.tolist()


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        ([0.0] * 3, "its embedding has 3 numbers, not"),
        (None, "its embedding is no unit vector; embed it again"),
        (float("nan"), "its embedding is no unit vector; embed it again"),
    ],
)
def test_what_is_no_unit_vector_of_this_model_is_refused(clip: ClipScorer, vector: object, said: str) -> None:
    given = np.asarray(vector if isinstance(vector, list) else [vector or 0.0] * clip.width, dtype=np.float16)
    with pytest.raises(ValueError, match=said):
        StoredClip(clip).encode_images([given])
