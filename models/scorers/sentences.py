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
    parts: list[str] = []
    start = 0
    for end in _END.finditer(text):
        head = text[start : end.start()]
        closing = text[end.start() : end.end()].rstrip()
        if "\n" not in end[0] and _ABBREVIATION.search(head):
            continue
        parts.append(head + closing)
        start = end.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
