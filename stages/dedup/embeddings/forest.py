"""Maximum spanning forests of near vectors: of all pairs that a search found, few enough to keep, and enough to answer
for every higher threshold.

The pairs of a maximum spanning forest whose cosine reaches a threshold connect the same vectors as all pairs that reach
it (the cut property). So groups at a higher threshold need no new search: they are those that a search at that
threshold would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import NONE, Indices
from ..groups import Components

Vectors = npt.NDArray[np.float16]  # (n, width), of any non-zero length
Doubles = npt.NDArray[np.float64]

_LAST_BITS = 1e-9  # a vector's cosine with itself is 1 but for them
_AT_ONCE = 4096  # pairs whose vectors are copied at once


@dataclass(frozen=True)
class Edges:
    """Pairs of nodes and their cosines, all ``(n,)``."""

    left: Indices
    right: Indices
    cosine: Doubles

    def __len__(self) -> int:
        return len(self.left)

    def take(self, chosen: npt.NDArray[Any]) -> Edges:
        """A subset, by a mask or in the order of ``chosen``."""
        return Edges(self.left[chosen], self.right[chosen], self.cosine[chosen])

    def reaching(self, cosine: float) -> Edges:
        """Those that reach a threshold."""
        return self.take(reach(self.cosine, cosine))


NO_EDGES = Edges(NONE, NONE, np.empty(0))


def joined(parts: list[Edges]) -> Edges:
    """All edges of some sets."""
    parts = [NO_EDGES, *parts]
    left, right, cosine = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("left", "right", "cosine")
    )
    return Edges(left, right, cosine)


def reach(values: Doubles, cosine: float) -> npt.NDArray[np.bool_]:
    """Whether cosines reach a threshold: the one rule for what is near, in a search and in its replay."""
    return values >= cosine - _LAST_BITS


def cosines(vectors: Vectors, left: Indices, right: Indices) -> Doubles:
    """Cosines of pairs of vectors in double precision, ``(n,)``. A pair's value depends on its two vectors alone."""
    out = np.empty(len(left))
    for start in range(0, len(left), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        a, b = (vectors[side[part]].astype(np.float64) for side in (left, right))
        out[part] = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return out


def maximum_forest(edges: Edges) -> Edges:
    """Maximum spanning forest by cosine (Borůvka's algorithm): the same components at every threshold, with fewer edges
    than nodes. Of equal cosines those of lower nodes go first, so the order of the edges does not matter."""
    edges = edges.take(np.lexsort((edges.right, edges.left, -edges.cosine)))
    nodes, ends = np.unique(np.concatenate([edges.left, edges.right]), return_inverse=True)
    left, right = ends[: len(edges)], ends[len(edges) :]
    components, kept = Components(len(nodes)), np.zeros(len(edges), dtype=bool)
    rest = np.arange(len(edges))  # edges between components, best first
    while len(rest):
        roots = components.roots(left[rest]), components.roots(right[rest])
        apart = roots[0] != roots[1]
        rest, a, b = rest[apart], roots[0][apart], roots[1][apart]
        best = np.full(len(nodes), len(edges))  # of each component's edges
        np.minimum.at(best, a, rest)
        np.minimum.at(best, b, rest)
        chosen = np.unique(best)
        chosen = chosen[chosen < len(edges)]
        kept[chosen] = True
        components.join(left[chosen], right[chosen])
    return edges.take(kept)


def near_forest(
    vectors: Vectors, left: Indices, right: Indices, similar: npt.NDArray[np.float32], cosine: float, rounding: float
) -> Edges:
    """The maximum spanning forest of those pairs of ``vectors`` that reach ``cosine``.

    ``similar``: their cosines as computed by a search, each off by at most ``rounding``. The most similar pairs are
    verified first; a pair whose ends are connected by better ones then cannot be in the forest, and is left out without
    a look at its vectors: a dense cluster costs some verified pairs for each vector, not all pairs.
    """
    nodes, ends = np.unique(np.concatenate([left, right]), return_inverse=True)
    left, right = ends[: len(left)], ends[len(left) :]
    components, verified, waiting = Components(len(nodes)), list[Edges](), NO_EDGES
    size = max(_AT_ONCE, 2 * len(nodes))
    while len(left):
        order = np.argpartition(-similar, size) if len(left) > size else np.arange(len(left))
        now, rest = order[:size], order[size:]
        found = Edges(left[now], right[now], cosines(vectors, nodes[left[now]], nodes[right[now]])).reaching(cosine)
        verified.append(found)
        waiting = joined([waiting, found])
        left, right, similar = left[rest], right[rest], similar[rest]
        if len(rest):
            better = waiting.cosine >= similar.max() + rounding  # than anything that is still to be looked at
            components.join(waiting.left[better], waiting.right[better])
            waiting = waiting.take(~better)
            apart = components.roots(left) != components.roots(right)
            left, right, similar = left[apart], right[apart], similar[apart]
        size *= 2
    kept = maximum_forest(joined(verified))
    return Edges(nodes[kept.left], nodes[kept.right], kept.cosine)
