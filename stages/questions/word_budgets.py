"""Captions cut at a number of words, each budget a system of its own: how much a caption says in its first words.

As the word-budgeted CaptionQA of RubiCap (arXiv 2603.09160): what a captioner gains by length alone is seen.
"""

from __future__ import annotations

import re

from ..annotate.loops import units_of

_NAME = re.compile(r"(?P<system>[^@#]+)@(?P<words>[1-9]\d*)(?:#\d+)?")
_ROUNDING = 1e-6  # of sums of fractions of words


def cut(text: str, words: int) -> str:
    """The beginning of ``text`` up to its first ``words`` words, as it is written; all of it if it has no more.

    Words stand between white space, with their punctuation; in scripts without spaces they are counted by characters,
    two Chinese ones or four Thai ones a word. Raises ValueError unless ``words`` is at least 1.
    """
    if words < 1:
        raise ValueError(f"a budget of {words} words, not at least 1")
    end, counted = 0, 0.0
    for unit in units_of(text):
        counted += unit.words
        if counted > words + _ROUNDING:
            return text[:end].rstrip()
        end = unit.end
    return text


def budgeted(name: str, words: int) -> str:
    """Name of a caption cut at ``words``: "dense#1" becomes "dense@50#1". No prompt's name has an @."""
    system, mark, number = name.partition("#")
    return f"{system}@{words}{mark}{number}"


def budget_of(system: str) -> tuple[str, int] | None:
    """System and budget in a name by :func:`budgeted`; None for any other name."""
    match = _NAME.fullmatch(system)
    return None if match is None else (match["system"], int(match["words"]))
