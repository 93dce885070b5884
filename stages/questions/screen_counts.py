"""Counts of screened questions: what each arm refuses, by itself and beside the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...manifests.status import QuestionStatus
from ...models.quiz import asks_absent
from .screen import ScreenConfig

#: Arms by what they ask for, in the words of a report.
IMAGE, ABSTAINING, GUESSING = "with the image", "without it", "by a forced guess"


@dataclass
class ScreenCounts:
    """``asked``: questions put to the reader. ``refused``: by arm, whatever the others say; ``alone``: by it only."""

    asked: int = 0
    kept: int = 0
    unscored: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)

    def line(self, config: ScreenConfig) -> str:
        """For users: each arm that was asked, with its counts."""
        arms = [IMAGE, *([ABSTAINING] if config.abstains else []), *([GUESSING] if config.guesses else [])]
        words = {IMAGE: "not right with the image", ABSTAINING: "right without it", GUESSING: "right by a forced guess"}
        each = [f"{self.refused[arm]:,} {words[arm]} ({self.alone[arm]:,} for that alone)" for arm in arms]
        unscored = f"; {self.unscored:,} unscored" if self.unscored else ""
        return f"screening kept {self.kept:,} of {self.asked:,} questions; refused: {', '.join(each)}{unscored}"


def count_screened(entries: Iterable[Mapping[str, Any]], config: ScreenConfig) -> ScreenCounts:
    """Counts of stored questions; those that were not asked, as the writer's duplicates, are left out."""
    counts = ScreenCounts()
    for entry in entries:
        if entry["with_image"] is None:
            continue
        counts.asked += 1
        counts.kept += entry["status"] == QuestionStatus.OK
        counts.unscored += entry["status"] == QuestionStatus.UNSCORED
        arms = list(_refusing(entry, config))
        counts.refused.update(arms)
        if len(arms) == 1:
            counts.alone[arms[0]] += 1
    return counts


def _refusing(entry: Mapping[str, Any], config: ScreenConfig) -> Iterator[str]:
    if entry["status"] == QuestionStatus.UNSUPPORTED:
        yield IMAGE
    blind, guess = entry["text_accuracy"], entry.get("guess_accuracy")
    if blind is not None and config.leaks(blind):
        yield ABSTAINING
    absent = asks_absent(entry.get("kind"), entry["options"], entry.get("answer"))
    if guess is not None and config.guess_leaks(guess, len(entry["options"]), absent):
        yield GUESSING
