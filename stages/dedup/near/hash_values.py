"""The distinct hashes of a set and its references, and whose they are: equal ones are searched once.

A node is a file, or a reference with the number of files added to its own. Of files with the same hashes and signature
only the first is a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arrays import U64, Bools, Indices
from ..groups import Contents, lookalikes

Kinds = npt.NDArray[np.uint8]

# What a hash is of, as bits: a hash may be of several.
FILE, FILE_INNER, REFERENCE, REFERENCE_INNER = 1, 2, 4, 8


def are_compared(left: Kinds, right: Kinds) -> Bools:
    """Whether near hashes of these kinds make their images candidates: whole images are compared with each other, and
    with the centres of others, which finds cropped copies; references with files alone."""
    crop = ((left & FILE_INNER) != 0) & ((right & REFERENCE) != 0)
    crop |= ((right & FILE_INNER) != 0) & ((left & REFERENCE) != 0)
    either: Bools = crop | ((left & FILE) != 0) | ((right & FILE) != 0)
    return either


@dataclass(frozen=True)
class HashValues:
    """Distinct ``hashes`` in ascending order, with the union of their ``kinds``.

    The nodes with the i-th hash are ``nodes[starts[i]:starts[i + 1]]``, of ``node_kinds`` with regard to this hash.
    ``twins``: positions of the two hashes of each node that has two, ``(2, n)``.
    """

    hashes: U64
    kinds: Kinds
    starts: Indices
    nodes: Indices
    node_kinds: Kinds
    twins: Indices

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def counts(self) -> Indices:
        """Number of nodes with each hash."""
        return np.diff(self.starts)


def hash_values(files: Contents, references: Contents | None) -> HashValues:
    """Collect the hashes of files and references."""
    parts = [_entries(files, 0, FILE, FILE_INNER)]
    if references is not None:
        parts.append(_entries(references, len(files), REFERENCE, REFERENCE_INNER))
    hashes, nodes, kinds = (np.concatenate([part[k] for part in parts]) for k in range(3))
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(new)
    value_of = np.empty(len(order), dtype=np.int64)
    value_of[order] = np.cumsum(new) - 1
    union = np.bitwise_or.reduceat(kinds[order], starts) if len(starts) else kinds
    twins = _twins(nodes, value_of)
    return HashValues(ordered[new], union, np.append(starts, len(order)), nodes[order], kinds[order], twins)


def _entries(contents: Contents, first: int, whole: int, inner: int) -> tuple[U64, Indices, Kinds]:
    """Hashes with their node and kind; an image whose two hashes are equal has one entry of both kinds."""
    distinct = np.unique(lookalikes(contents))
    phash, centre = contents.phash[distinct], contents.inner[distinct]
    equal = phash == centre
    kinds = np.where(equal, whole | inner, whole).astype(np.uint8)
    hashes = np.concatenate([phash, centre[~equal]])
    nodes = first + np.concatenate([distinct, distinct[~equal]])
    return hashes, nodes, np.concatenate([kinds, np.full(int((~equal).sum()), inner, dtype=np.uint8)])


def _twins(nodes: Indices, value_of: Indices) -> Indices:
    order = np.argsort(nodes, kind="stable")
    second = np.flatnonzero(nodes[order[1:]] == nodes[order[:-1]])
    return np.stack([value_of[order[second]], value_of[order[second + 1]]])
