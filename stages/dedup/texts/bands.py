"""MinHash signatures, and bands of them: two texts are compared if they agree in one (Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, 3.3 and 3.4). Signatures are rensa's R-MinHash, of which each slot agrees with the
probability of the Jaccard index. 16 bits of a slot are kept (Li and König, b-bit minwise hashing, 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ....errors import BadInput
from ..arrays import U64
from .shingles import Shingles

SLOTS = 256  # numbers in a signature
SIGNATURE_BYTES = 2 * SLOTS
RECALL = 0.99  # least probability that two texts exactly as alike as the threshold are compared
_SEED = 0
_PRIME, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)

Signatures = npt.NDArray[np.uint16]  # (texts, SLOTS)


def require_rensa() -> Any:
    """Import rensa. Raises BadInput, with install instructions, if it is missing."""
    try:
        import rensa
    except ImportError as error:
        text = f"near-duplicate texts need rensa, which cannot be imported ({error})"
        raise BadInput(f"{text}; install it with: pip install 'capipe[dedup]'") from None
    return rensa


def sign(texts: Sequence[Shingles]) -> Signatures:
    """Signatures of texts."""
    minhash = require_rensa().RMinHash
    signatures = np.empty((len(texts), SLOTS), dtype=np.uint16)
    for number, text in enumerate(texts):
        signature = minhash(SLOTS, _SEED)  # one by one: the library's batches start threads
        signature.update(list(text))
        signatures[number] = np.array(signature.digest(), dtype=np.uint32).astype(np.uint16)
    return signatures


@dataclass(frozen=True)
class Bands:
    """``count`` bands of ``rows`` slots each."""

    count: int
    rows: int

    @classmethod
    def of(cls, threshold: float) -> Bands:
        """The bands with most rows, which propose fewest other pairs, that find pairs at ``threshold`` by RECALL."""
        fitting = (cls(SLOTS // rows, rows) for rows in range(SLOTS, 0, -1))
        return next(bands for bands in fitting if bands.recall(threshold) >= RECALL)

    def recall(self, similarity: float) -> float:
        """Probability that two texts with this Jaccard index agree in a band."""
        return float(1 - (1 - similarity**self.rows) ** self.count)

    def keys(self, signatures: Signatures) -> U64:
        """A key for each band of each text, ``(texts, count)``: equal where all slots of the band are."""
        slots = signatures[:, : self.count * self.rows].reshape(len(signatures), self.count, self.rows)
        keys = np.zeros((len(signatures), self.count), dtype=np.uint64)
        for row in range(self.rows):
            keys = keys * _PRIME + slots[:, :, row]
            keys = (keys ^ (keys >> np.uint64(29))) * _MIX
        return keys
