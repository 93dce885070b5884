"""Captions by sentence: models that read 77 tokens score long captions one sentence at a time."""

from __future__ import annotations

import re

# A sentence ends at . ! ? … (with closing quotes or brackets) before white space and what may begin another; at a line
# break that ends a line of a list or a paragraph; and after the full-width marks, which no white space follows.
_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W_a-z])|\s*\n\s*|(?<=[。！？])\s*")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|No|vs|approx|etc|e\.g|i\.e|[A-Z])\.)$")


def split_sentences(text: str) -> list[str]:
    """The sentences of ``text`` in order, stripped; an empty text has none.

    Abbreviations and initials ("Dr. Who", "J. S. Bach") do not end one, nor does a point inside a number.
    """
    return [text[start:end] for start, end in sentence_spans(text)]


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and end in ``text`` of each of its sentences (:func:`split_sentences`)."""
    spans: list[tuple[int, int]] = []
    start = 0
    for end in _END.finditer(text):
        if "\n" not in end[0] and _ABBREVIATION.search(text[start : end.start()]):
            continue
        spans.append((start, end.start() + len(end[0].rstrip())))
        start = end.end()
    spans.append((start, len(text)))
    return [stripped for span in spans if (stripped := _stripped(text, *span))[0] < stripped[1]]


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends."""
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())
