"""Figures of captions by the number of words at which they are cut: quiz accuracy, and answers in words."""

from __future__ import annotations

from collections.abc import Callable

from ...stages.questions.word_budgets import budget_of, budgeted
from .bootstrap import NOTHING, Estimate
from .cells import NONE, Grid, percent
from .results import EvaluationReport, System

TITLE, OPEN_TITLE = "Right % by word budget", "Relaxed accuracy % by word budget"


def budget_grid(report: EvaluationReport) -> Grid:
    """A row per system with budgets, a column per budget, the whole captions last; without rows if there are none."""
    return _grid(report, TITLE, lambda system: system.quiz.accuracy)


def open_budget_grid(report: EvaluationReport) -> Grid:
    """The same of open-ended questions, by relaxed accuracy; without rows if there are none."""
    return _grid(report, OPEN_TITLE, lambda system: NOTHING if system.open_ended is None else system.open_ended.relaxed)


def _grid(report: EvaluationReport, title: str, figure: Callable[[System], Estimate]) -> Grid:
    named = {system.name: system for system in report.systems}
    known = [budget for name in named if (budget := budget_of(name)) is not None]
    budgets = sorted({words for _, words in known})
    rows = []
    for system in dict.fromkeys(system for system, _ in known):
        cut = [named.get(budgeted(system, words)) for words in budgets] + [named.get(system)]
        cells = [NONE if each is None else percent(figure(each)) for each in cut]
        rows += [(system, *cells)] if any(cell != NONE for cell in cells) else []
    note = "Each caption cut at so many words and read again; a shorter one is read as it is. Last: whole captions."
    return Grid(title, ("system", *(f"{words} words" for words in budgets), "all words"), tuple(rows), note)
