"""Word tokenization of captions, and n-gram repetition."""

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
    """Case-folded words without punctuation; "it's" and "T-shirt" are one word each."""
    return _WORD.findall(text.casefold())


def word_ends(text: str) -> list[tuple[str, int]]:
    """Each case-folded word with its end offset in ``text``."""
    return [(match[0].casefold(), match.end()) for match in _WORD.finditer(text)]


def repeated_share(words: list[str], size: int = GRAM) -> float:
    """Fraction of ``size``-grams that repeat an earlier one; 0 if there are none."""
    all_grams = grams(words, size)
    return 1 - len(set(all_grams)) / len(all_grams) if all_grams else 0.0


def repeats(items: Sequence[Hashable], size: int = GRAM) -> list[int]:
    """Indices of the items that complete a repeated ``size``-gram."""
    seen: set[tuple[Hashable, ...]] = set()
    places = []
    for start, gram in enumerate(grams(items, size)):
        if gram in seen:
            places.append(start + size - 1)
        seen.add(gram)
    return places


def grams(items: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    """All ``size``-grams."""
    return list(zip(*(items[start:] for start in range(size)), strict=False))
