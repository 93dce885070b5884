"""Lists in Python notation, as MMMU's files keep their options: read by a strict parser, never evaluated."""

from __future__ import annotations

import re

LONGEST = 100_000  # characters; a longer text is no list of options

_ITEM = re.compile(
    r"\s*(?P<item>'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|-?\d{1,300}(?:\.\d{1,300})?|True|False)\s*(?P<end>[,\]])"
)
_CLOSED = re.compile(r"\s*\]")
_ESCAPE = re.compile(r"\\(?:(?P<code>x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|(?P<sign>[\\'\"nrt]))")
_SIGNS = {"n": "\n", "r": "\r", "t": "\t"}


def from_python(text: str) -> list[object] | None:
    """A list of texts, numbers and bools in Python's notation; None for any other text.

    Nothing else is accepted: no nested lists, no prefixed or joined strings (NumPy's "['a' 'b']" has no commas, and
    Python would take it as one text). Unknown escapes are left as they are.
    """
    text = text.strip()
    if len(text) > LONGEST or not text.startswith("["):
        return None
    items: list[object] = []
    place = 1
    while _CLOSED.fullmatch(text, place) is None:  # also after a comma, which Python allows
        match = _ITEM.match(text, place)
        if match is None:
            return None
        try:
            items.append(_value(match["item"]))
        except ValueError:  # an escape beyond Unicode
            return None
        place = match.end()
        if match["end"] == "]":
            return items if place == len(text) else None
    return items


def _value(item: str) -> object:
    if item in ("True", "False"):
        return item == "True"
    if item[0] in "'\"":
        return _ESCAPE.sub(_unescaped, item[1:-1])
    return float(item) if "." in item else int(item)


def _unescaped(match: re.Match[str]) -> str:
    if match["code"] is not None:
        return chr(int(match["code"][1:], 16))
    return _SIGNS.get(match["sign"], match["sign"])
