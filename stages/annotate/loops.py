"""Repetition loops in a text: consecutive copies of a phrase, in scripts with and without spaces between words.

A text is split into units: words between spaces; single characters in scripts without spaces (Chinese, Japanese, Thai,
Lao, Khmer, Burmese, Tibetan), and in "words" longer than those of any language (a sequence of tags, a digest).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_IDEOGRAPHIC = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
_SYLLABIC = "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
_FULL_WIDTH = "\u3000-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # punctuation
_UNSPACED = re.compile(f"[{_IDEOGRAPHIC}{_SYLLABIC}]")
_PIECES = re.compile(
    f"(?P<ideograph>[{_IDEOGRAPHIC}])|(?P<syllabic>[{_SYLLABIC}])|(?P<mark>[{_FULL_WIDTH}])"
    f"|[^{_IDEOGRAPHIC}{_SYLLABIC}{_FULL_WIDTH}]+"
)
#: Words per unit, roughly: Chinese words have two characters, Thai words four.
_WORDS = {"ideograph": 0.5, "syllabic": 0.25, "mark": 0.0}
_LONGEST_WORD = 40  # characters
_ROW_CELLS = 64
SHORT = 3  # words: lists and rhetoric legitimately repeat a word or two
LONGEST_PHRASE = 200  # units


class Unit(NamedTuple):
    """A piece of a text between offsets ``start`` and ``end``; ``words``: its length in words.

    ``row``: it is a whole line, the row of a table.
    """

    text: str
    words: float
    start: int
    end: int
    row: bool = False

    @property
    def of_long_word(self) -> bool:
        """True for a character of a "word" longer than those of any language."""
        return 0 < self.words < 1 / _LONGEST_WORD


class Loop(NamedTuple):
    """A phrase, as units of the text, and its number of consecutive copies."""

    phrase: Sequence[Unit]
    copies: int

    @property
    def words(self) -> float:
        return sum(unit.words for unit in self.phrase)

    def of(self, text: str) -> str:
        """The phrase as written in the text."""
        return text[self.phrase[0].start : self.phrase[-1].end]


def find_loop(text: str, repeats: int) -> str | None:
    """A phrase with ``repeats`` consecutive copies, or None. Phrases under three words need twice as many."""
    for loop in loops_in(units_of(text), repeats):
        if loop.copies >= (repeats if loop.words >= SHORT else 2 * repeats):
            return loop.of(text)
    return None


def units_of(text: str, *, rows: bool = False) -> list[Unit]:
    """Units of the text, in order. ``rows``: table rows (and lines without letters or digits) are one unit each."""
    if not rows:
        return list(_units_between(text, 0, len(text)))
    units: list[Unit] = []
    for line in re.finditer(r"[^\n]+", text):
        start, end = line.span()
        if is_row(line[0]):
            units.append(Unit(line[0].strip(), 1.0, start, end, row=True))
        else:
            units += _units_between(text, start, end)
    return units


def is_row(line: str) -> bool:
    """True for a row of a Markdown table or a line without letters and digits, unless it is extremely long."""
    shown = line.strip()
    bars = shown.count("|")
    if bars > _ROW_CELLS or not shown or len(shown) > _ROW_CELLS * _LONGEST_WORD:
        return False
    return (shown.startswith("|") and bars >= 2) or not any(c.isalnum() for c in shown)


def _units_between(text: str, start: int, end: int) -> Iterator[Unit]:
    for word in re.compile(r"\S+").finditer(text, start, end):
        begin = word.start()
        if _UNSPACED.search(word[0]):
            for piece in _PIECES.finditer(word[0]):
                words = _WORDS[piece.lastgroup] if piece.lastgroup else 1.0
                yield Unit(piece[0], words, begin + piece.start(), begin + piece.end())
        elif len(word[0]) > _LONGEST_WORD:
            for offset, letter in enumerate(word[0], begin):
                yield Unit(letter, 1 / len(word[0]), offset, offset + 1)  # together still one word
        else:
            yield Unit(word[0], 1.0, begin, word.end())


def loops_in(units: Sequence[Unit], repeats: int, longest: int = LONGEST_PHRASE) -> Iterator[Loop]:
    """All phrases of up to ``longest`` units with at least ``repeats`` consecutive copies, shortest first.

    A text that equals itself shifted by ``length`` units over ``length * (repeats - 1)`` consecutive units holds
    ``repeats`` copies. A phrase that is itself a repetition of a shorter one is skipped.
    """
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(unit.text, len(numbers)) for unit in units], np.int64)
    if len(numbers) == len(ids):
        return
    for length in range(1, min(longest, len(ids) // 2) + 1):
        equal = ids[length:] == ids[:-length]
        needed = length * (repeats - 1)
        if np.count_nonzero(equal) < needed:
            continue
        for begin, end in _runs(equal):
            if end - begin >= needed and not _repeats_itself(ids[begin : begin + length]):
                yield Loop(units[begin : begin + length], (end - begin) // length + 1)


def _runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Begin and end of each run of set flags."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _repeats_itself(ids: npt.NDArray[np.int64]) -> bool:
    length = len(ids)
    divisors = (d for d in range(1, length // 2 + 1) if length % d == 0)
    return any(np.array_equal(ids[d:], ids[:-d]) for d in divisors)


def distinct_share(units: Sequence[Unit]) -> tuple[int, int]:
    """Number of distinct words (and numbers) in the units, and their total.

    In scripts without spaces, overlapping n-grams of an average word's length are used instead of words.
    """
    words = [word.lower() for at in range(len(units)) if (word := _word_at(units, at)) and any(map(str.isalnum, word))]
    return len(set(words)), len(words)


def _word_at(units: Sequence[Unit], at: int) -> str | None:
    """The word that starts at a unit; None for punctuation, and for all but the first letter of a long word."""
    unit = units[at]
    if not unit.words:
        return None
    if unit.of_long_word and at and units[at - 1].of_long_word and units[at - 1].end == unit.start:
        return None
    return "".join(piece.text for piece in units[at : at + round(1 / unit.words)])
