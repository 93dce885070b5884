"""A caption as words: what counts as one, and how much of a caption says again what it said before."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
GRAM = 4


def words_of(text: str) -> list[str]:
    """Words without case and punctuation; "it's" and "T-shirt" are one word each."""
    return _WORD.findall(text.casefold())


def repeated_share(words: list[str], size: int = GRAM) -> float:
    """The share of the ``size``-grams that occurred before; 0 where there is none."""
    grams = list(zip(*(words[start:] for start in range(size)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
