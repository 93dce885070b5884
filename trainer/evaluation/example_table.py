"""Captions of a few images with the answers from them, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cells import NONE, Grid
from .results import ShownCaption

_LONGEST = 1000  # characters of a caption in Markdown; the JSON has all of it
_LONGEST_ANSWER = 100  # of an answer in words, and of a question


def examples_grid(examples: Sequence[ShownCaption]) -> Grid:
    """A row per caption."""
    rows = [
        (
            each.key,
            each.system,
            NONE if each.text is None else _cut(each.text, _LONGEST),
            "\n".join(_said(each)) or NONE,
        )
        for each in examples
    ]
    note = "Beside each caption: presentations answered right, of those scored."
    if any(example.in_words for example in examples):
        note += " Answers in words, and in brackets those that are accepted."
    return Grid("Examples", ("image", "system", "caption", "questions"), tuple(rows), note, words=True)


def _said(example: ShownCaption) -> Iterator[str]:
    if example.answers:
        yield ", ".join(
            f"{answer.kind} {answer.right}/{answer.scored}"
            + (f" ({answer.abstained} cannot tell)" if answer.abstained else "")
            for answer in example.answers
        )
    for words in example.in_words:
        said = NONE if words.said is None else _cut(words.said, _LONGEST_ANSWER)
        accepted = _cut(" or ".join(words.accepted), _LONGEST_ANSWER)
        yield f"{_cut(words.question, _LONGEST_ANSWER)} {said} ({accepted})"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "…"
