"""A caption as words: what counts as one, and how much of a caption says again what it said before."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
GRAM = 4
_COLORS = (
    "beige black blue brown crimson cyan gold golden gray green grey indigo ivory lavender lilac magenta maroon mauve "
    "navy olive orange pink purple red rose scarlet silver tan teal turquoise violet white yellow"
)
COLORS = frozenset(_COLORS.split())


def words_of(text: str) -> list[str]:
    """Words without case and punctuation; "it's" and "T-shirt" are one word each."""
    return _WORD.findall(text.casefold())


def word_ends(text: str) -> list[tuple[str, int]]:
    """Each word, without case, and where in ``text`` it ends."""
    return [(found[0].casefold(), found.end()) for found in _WORD.finditer(text)]


def repeated_share(words: list[str], size: int = GRAM) -> float:
    """The share of the ``size``-grams that occurred before; 0 where there is none."""
    found = grams(words, size)
    return 1 - len(set(found)) / len(found) if found else 0.0


def repeats(items: Sequence[Hashable], size: int = GRAM) -> list[int]:
    """The places of the items that complete a ``size``-gram which occurred before."""
    seen: set[tuple[Hashable, ...]] = set()
    places = []
    for start, gram in enumerate(grams(items, size)):
        if gram in seen:
            places.append(start + size - 1)
        seen.add(gram)
    return places


def grams(items: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    """All runs of ``size`` neighbours."""
    return list(zip(*(items[start:] for start in range(size)), strict=False))
