"""Groups of near-duplicate texts, each around one text, its leader, to which all others of the group are near.

Texts are taken in a fixed order. One that is near an earlier leader joins the nearest; any other is a leader. So no
text is marked for one that it is not near (a chain of small differences would join all captions of a simple captioner),
no two leaders that were compared are near each other, and a dense cluster costs a comparison each, not one per pair.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import NONE, U64, Floats, Indices
from ..groups import Components
from .shingles import Shingles, jaccard

PER_BAND = 100  # leaders with one key that a text is compared with
_CACHED = 10_000  # leaders whose shingles are kept
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
        texts, keys, numbered = [NONE], [NONE], 0
        for band in bands:
            order = np.argsort(band, kind="stable")
            ordered = band[order]
            same = ordered[1:] == ordered[:-1]
            shared = np.zeros(len(band), dtype=bool)
            shared[1:] |= same
            shared[:-1] |= same
            first = np.ones(len(band), dtype=bool)
            first[1:] = ~same
            texts.append(order[shared])
            keys.append(numbered + np.cumsum(first[shared]) - 1)
            numbered += int(first[shared].sum())
        return cls(np.concatenate(texts), np.concatenate(keys))


def group_texts(
    count: int,
    priority: Indices,
    meetings: Meetings,
    shingles: Callable[[int], Shingles],
    threshold: float,
    stopped: Callable[[], bool] = lambda: False,
) -> Leaders | None:
    """Group ``count`` texts; None if ``stopped`` says so.

    ``priority``: position of each text in the order, ``(count,)``. ``shingles``: of a text by its number.
    """
    leader, similarity = np.arange(count), np.ones(count, dtype=np.float32)
    cached, crowded = _Cache(shingles), 0
    for number, (text, keys, by_key) in enumerate(_in_order(count, priority, meetings)):
        if number % _CHECK_EVERY == 0 and stopped():
            return None
        own = shingles(text)
        nearest, best = text, 0.0
        for other in {other: None for key in keys for other in by_key[key]}:
            near = _near(own, cached(other), threshold)
            if near > best or (near == best > 0 and priority[other] < priority[nearest]):
                nearest, best = other, near
        if nearest != text:
            leader[text], similarity[text] = nearest, best
            continue
        full = [key for key in keys if len(by_key[key]) >= PER_BAND]
        crowded += bool(full)
        for key in keys:
            if len(by_key[key]) < PER_BAND:
                by_key[key].append(text)
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


def _in_order(
    count: int, priority: Indices, meetings: Meetings
) -> Iterator[tuple[int, list[int], defaultdict[int, list[int]]]]:
    """Texts that meet others, by component and priority, with their keys and the leaders by key of their component."""
    components = Components(count)
    same = meetings.keys[1:] == meetings.keys[:-1]
    components.join(meetings.texts[:-1][same], meetings.texts[1:][same])
    roots = components.roots(np.arange(count))
    order = np.lexsort((meetings.keys, priority[meetings.texts], roots[meetings.texts]))
    texts, keys = meetings.texts[order], meetings.keys[order]
    starts = np.flatnonzero(np.diff(texts, prepend=-1))
    ends = np.append(starts[1:], len(texts))[: len(starts)]
    root, by_key = -1, defaultdict[int, list[int]](list)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        text = int(texts[start])
        if roots[text] != root:
            root, by_key = int(roots[text]), defaultdict(list)
        yield text, keys[start:end].tolist(), by_key


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
