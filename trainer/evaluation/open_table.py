"""Answers in words to open-ended questions, as a table."""

from __future__ import annotations

from .cells import Grid, percent
from .results import EvaluationReport

TITLE = "Open-ended questions"


def open_grid(report: EvaluationReport) -> Grid:
    """A row per system with such answers; without rows if there are none."""
    rows = [
        (
            system.name,
            percent(entry.relaxed),
            percent(entry.scaled),
            percent(entry.anls),
            percent(entry.abstained, interval=False),
            str(entry.relaxed.n),
            str(entry.unanswered),
        )
        for system in report.systems
        if (entry := system.open_ended) is not None
    ]
    note = (
        "Relaxed: numbers within 5 %, texts equal but for case and a final full stop (ChartQA). Scaled: the number "
        "times 1, 0.01 or 100, too (CapRL, for charts). ANLS: similarity by edit distance, 0 from one of a half. "
        "Unanswered: refused, or failed; in no figure."
    )
    header = ("system", "relaxed %", "scaled %", "ANLS %", "cannot tell %", "questions", "unanswered")
    return Grid(TITLE, header, tuple(rows), note)
