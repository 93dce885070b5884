"""A CLIP's scores from stored image embeddings: its vision encoder sees no image again.

Embeddings are stored as unit vectors in half precision. Rounding moves such a vector by at most 2^-11 of its length, so
a cosine differs by at most :data:`ROUNDING` from that of the encoder's own vector; seen were 4e-5 at most
(``bench/stages/embedded_scores.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from .base import Pair
from .clip import ClipScorer

ROUNDING = 2.0**-11
_LENGTHS = (0.99, 1.01)  # of what passes for a stored unit vector


class StoredClip:
    """A :class:`.base.PairScorer` that reads stored embeddings in place of pixels, and has no preprocessing."""

    name, preprocess = ClipScorer.name, None

    def __init__(self, clip: ClipScorer) -> None:
        self._clip = clip

    @cached_property
    def width(self) -> int:
        """Width of a feature vector."""
        return int(self._clip.encode_texts(["a picture"]).shape[1])

    @torch.inference_mode()
    def encode_images(self, pixels: Sequence[npt.NDArray[Any]]) -> Tensor:
        """Unit vectors (n, width), float32, from stored ones. Raises ValueError for another width or length."""
        stored = torch.from_numpy(np.stack(pixels).astype(np.float32))
        if stored.shape[1] != self.width:
            raise ValueError(f"its embedding has {stored.shape[1]} numbers, not {self.width}; embed it again")
        lengths = stored.norm(dim=-1)
        if not bool(((lengths >= _LENGTHS[0]) & (lengths <= _LENGTHS[1])).all()):
            raise ValueError("its embedding is no unit vector; embed it again")
        return functional.normalize(stored, dim=-1).to(self._clip.device)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return self._clip.tokenize(texts)

    def score(self, images: Tensor, pairs: Sequence[Pair], tokens: Any = None) -> list[float]:
        return self._clip.score(images, pairs, tokens)
