"""Texts as sets of shingles, and how alike two are: character n-grams and the Jaccard index (Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, 3.2 and 3.3).

Characters, not words: Chinese, Japanese and Thai are written without spaces.
"""

from __future__ import annotations

import re
import unicodedata

Shingles = frozenset[str]

MOST_CHARACTERS = 10_000  # of a text that are compared: memory and time of a text are bounded
LETTERS = 5  # characters per shingle
DENSE_LETTERS = 2  # per shingle of Chinese characters, kana and Hangul, of which one says about as much

_DENSE = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
_HAS_DENSE = re.compile(f"[{_DENSE}]")
_RUNS = re.compile(f"[{_DENSE}]+|[^{_DENSE}]+")


class _Spaces(dict[int, int]):
    """For `str.translate`: characters of some general categories as spaces. It fills itself."""

    def __init__(self, categories: str) -> None:
        self._categories = categories

    def __missing__(self, code: int) -> int:
        self[code] = 32 if unicodedata.category(chr(code))[0] in self._categories else code
        return self[code]


_WORDS, _SIGNS = _Spaces("PZC"), _Spaces("ZC")  # punctuation, separators, control characters and lone surrogates


def normalized(text: str) -> str:
    """The part of a text that is compared: NFKC, without case, punctuation and control characters, with single spaces.

    Empty if it has nothing but white space and control characters. A text of punctuation alone keeps that.
    """
    folded = unicodedata.normalize("NFKC", text[:MOST_CHARACTERS]).casefold()
    words = folded.translate(_WORDS).split() or folded.translate(_SIGNS).split()
    return " ".join(words)[:MOST_CHARACTERS].rstrip()


def shingles(text: str) -> Shingles:
    """Distinct shingles of a normalized text. One that is shorter than a shingle is a shingle; so is such a part."""
    if not _HAS_DENSE.search(text):
        return frozenset(_windows(text, LETTERS))
    parts = (run.strip() for run in _RUNS.findall(text))
    return frozenset(
        window
        for part in parts
        if part
        for window in _windows(part, DENSE_LETTERS if _HAS_DENSE.match(part) else LETTERS)
    )


def _windows(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(max(1, len(text) - size + 1))]


def jaccard(one: Shingles, other: Shingles) -> float:
    """Shared shingles divided by all, from 0 to 1; the sets are not empty."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
