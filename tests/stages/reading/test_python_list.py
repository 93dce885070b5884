"""Lists in Python notation: what Python itself would read, and nothing that it would have to evaluate."""

from __future__ import annotations

import ast

import pytest

from capipe.stages.reading.python_list import LONGEST, from_python


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        " [ ] ",
        "['a']",
        "['a', \"b's\", ]",
        "[1, -2, 0.5, True, False]",
        r"['$\\frac{1}{2}$', 'it\'s', 'a\nb', '\xe9', '\u00e9', '\U0001F600']",
        "['a, b', '[c]', 'd]']",
        repr(["é", "a\tb", "\\", "\"'", "\u2028"]),
    ],
)
def test_it_reads_what_python_reads(text: str) -> None:
    assert from_python(text) == ast.literal_eval(text.strip())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "['a'",
        "['a'], ['b']",
        "['a' 'b']",
        "['a'\n 'b']",
        "[['a']]",
        "[f'a']",
        "[__import__('os')]",
        "[1 + 1]",
        "[,]",
        "['a',, 'b']",
        "['a\nb']",
        "['\\U00110000']",
        "('a', 'b')",
        "[" * 100_000,
        "['" + "a" * LONGEST + "']",
    ],
)
def test_it_reads_nothing_else(text: str) -> None:
    assert from_python(text) is None


def test_unknown_escapes_stay() -> None:
    assert from_python(r"['\alpha']") == [r"\alpha"]
