"""Groups of near-duplicate texts, each around one text, its leader, to which all others of the group are near.

Texts are taken in a fixed order. One that is near an earlier leader joins the nearest; any other is a leader. So no
text is marked for one that it is not near (a chain of small differences would join all captions of a simple captioner),
no two leaders that were compared are near each other, and a dense cluster costs a comparison each, not one per pair.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import NONE, U64, Floats, Indices
from ..groups import Components
from .bands import SLOTS, Signatures
from .shingles import Shingles, jaccard

PER_BAND = 100  # leaders with one key that a text is compared with
_CACHED = 10_000  # leaders whose shingles are kept
_DEVIATIONS = 4  # of the agreement of signatures: one pair of 30,000 at the threshold is taken for too different
_CHECK_EVERY = 1000  # texts between looks at `stopped`


@dataclass(frozen=True)
class Leaders:
    """``leader``: of each text, ``(n,)``, itself if it is one; ``similarity``: Jaccard index with it, ``(n,)``.

    ``crowded``: number of texts that agreed in a band with more than :data:`PER_BAND` leaders, of which some were not
    compared.
    """

    leader: Indices
    similarity: Floats
    crowded: int = 0


@dataclass(frozen=True)
class Meetings:
    """Texts that agree with another in a band. ``texts[k]`` has the key number ``keys[k]``; sorted by key."""

    texts: Indices
    keys: Indices

    @classmethod
    def of(cls, bands: Iterable[U64]) -> Meetings:
        """``bands``: the keys of all texts in each band, ``(n,)``. Keeps one band in memory, and what meets."""
        texts, keys, numbered = list[Indices](), list[Indices](), 0
        for band in bands:
            order = np.argsort(band, kind="stable")
            ordered = band[order]
            same = ordered[1:] == ordered[:-1]
            shared = np.zeros(len(band), dtype=bool)
            shared[1:] |= same
            shared[:-1] |= same
            first = np.ones(len(band), dtype=bool)
            first[1:] = ~same
            texts.append(_small(order[shared], len(band)))
            here = np.cumsum(first[shared])
            keys.append(_small(here + (numbered - 1), numbered + len(band)))
            numbered += int(here[-1]) if len(here) else 0
        return cls(np.concatenate(texts), np.concatenate(keys))


def _small(numbers: Indices, most: int) -> Indices:
    """Numbers up to ``most`` in half the memory, if possible."""
    return numbers.astype(np.int32) if most < 1 << 31 else numbers  # type: ignore[return-value]


def group_texts(
    priority: Indices,
    meetings: Meetings,
    signatures: Signatures,
    shingles: Callable[[int], Shingles],
    threshold: float,
    stopped: Callable[[], bool] = lambda: False,
) -> Leaders | None:
    """Group texts; None if ``stopped`` says so.

    ``priority``: position of each text in the order, ``(n,)``. ``signatures``: ``(n, SLOTS)``. ``shingles``: of a text
    by its number. Texts whose signatures say that they are too different are not compared.
    """
    leader, similarity = np.arange(len(priority)), np.ones(len(priority), dtype=np.float32)
    known, cached, crowded = _LeadersByKey(meetings), _Cache(shingles), 0
    least = _least_agreement(threshold)
    for number, (text, keys) in enumerate(_in_order(priority, meetings)):
        if number % _CHECK_EVERY == 0 and stopped():
            return None
        others = known.of(keys)
        agreement = (signatures[others] == signatures[text]).sum(axis=1)
        nearest, best = text, 0.0
        if len(others := others[agreement >= least]):
            own = shingles(text)
            for other in others[np.argsort(priority[others])].tolist():
                near = _near(own, cached(other), threshold)
                if near > best:
                    nearest, best = other, near
        if nearest != text:
            leader[text], similarity[text] = nearest, best
        else:
            crowded += not known.add(keys, text)
    return Leaders(leader, similarity, crowded)


def slow_group_texts(priority: Indices, texts: Sequence[Shingles], threshold: float) -> Leaders:
    """The same by comparing each text with every leader."""
    leader, similarity = np.arange(len(texts)), np.ones(len(texts), dtype=np.float32)
    leaders: list[int] = []
    for text in np.argsort(priority).tolist():
        near = [(jaccard(texts[text], texts[other]), other) for other in leaders]
        best = max((one for one, _ in near), default=0.0)
        if best < threshold:
            leaders.append(text)
            continue
        leader[text] = next(other for one, other in near if one == best)
        similarity[text] = best
    return Leaders(leader, similarity)


class _LeadersByKey:
    """Leaders that have a key, at most :data:`PER_BAND` of one. Arrays: there may be some thirty keys of each text."""

    def __init__(self, meetings: Meetings) -> None:
        sizes = np.bincount(meetings.keys) if len(meetings.keys) else NONE
        self._most = np.minimum(sizes, PER_BAND).astype(np.int32)
        self._starts = np.cumsum(self._most, dtype=np.int64) - self._most
        self._held = np.zeros(len(sizes), dtype=np.int32)
        self._leaders = np.zeros(int(self._most.sum()), dtype=meetings.texts.dtype)

    def of(self, keys: Indices) -> Indices:
        """Leaders that have one of the keys, each once."""
        held = self._held[keys]
        ends = np.cumsum(held)
        if not len(ends) or not ends[-1]:
            return NONE
        return np.unique(self._leaders[np.repeat(self._starts[keys] - ends + held, held) + np.arange(ends[-1])])

    def add(self, keys: Indices, leader: int) -> bool:
        """Add a leader with these keys, each once. False if there is no room under one of them."""
        free = keys[self._held[keys] < self._most[keys]]
        self._leaders[self._starts[free] + self._held[free]] = leader
        self._held[free] += 1
        return len(free) == len(keys)


def _in_order(priority: Indices, meetings: Meetings) -> Iterator[tuple[int, Indices]]:
    """Texts that meet others, by component and priority, with their keys."""
    components = Components(len(priority))
    same = meetings.keys[1:] == meetings.keys[:-1]
    components.join(meetings.texts[:-1][same], meetings.texts[1:][same])
    roots = components.roots(np.arange(len(priority)))
    order = np.lexsort((priority[meetings.texts], roots[meetings.texts]))
    texts, keys = meetings.texts[order], meetings.keys[order]
    starts = np.flatnonzero(np.diff(texts, prepend=-1))
    ends = np.append(starts[1:], len(texts))[: len(starts)]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield int(texts[start]), keys[start:end]


def _least_agreement(threshold: float) -> float:
    """Slots in which signatures agree if the Jaccard index is the threshold, less four standard deviations."""
    return SLOTS * threshold - _DEVIATIONS * math.sqrt(SLOTS * threshold * (1 - threshold))


def _near(one: Shingles, other: Shingles, threshold: float) -> float:
    """Jaccard index, 0 below the threshold."""
    if min(len(one), len(other)) < threshold * max(len(one), len(other)):
        return 0.0
    near = jaccard(one, other)
    return near if near >= threshold else 0.0


class _Cache:
    """Shingles of the texts that were asked for last."""

    def __init__(self, shingles: Callable[[int], Shingles]) -> None:
        self._shingles, self._kept = shingles, OrderedDict[int, Shingles]()

    def __call__(self, text: int) -> Shingles:
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        self._kept[text] = self._shingles(text)
        if len(self._kept) > _CACHED:
            self._kept.popitem(last=False)
        return self._kept[text]
