"""Quiz accuracy of captions by the number of words at which they are cut."""

from __future__ import annotations

from ...stages.questions.word_budgets import budget_of, budgeted
from .cells import NONE, Grid, percent
from .results import EvaluationReport

TITLE = "Right % by word budget"


def budget_grid(report: EvaluationReport) -> Grid:
    """A row per system with budgets, a column per budget, the whole captions last; without rows if there are none."""
    named = {system.name: system for system in report.systems}
    known = [budget for name in named if (budget := budget_of(name)) is not None]
    budgets = sorted({words for _, words in known})
    rows = []
    for system in dict.fromkeys(system for system, _ in known):
        cut = [named.get(budgeted(system, words)) for words in budgets] + [named.get(system)]
        rows.append((system, *(NONE if each is None else percent(each.quiz.accuracy) for each in cut)))
    note = "Each caption cut at so many words and read again; a shorter one is read as it is. Last: whole captions."
    return Grid(TITLE, ("system", *(f"{words} words" for words in budgets), "all words"), tuple(rows), note)
